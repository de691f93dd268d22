"""Facts about the data sets that the published tags name: classes and pixel statistics.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Means and standard deviations are
those of all pixels of the 50,000 training images, per channel (R, G, B), with pixels scaled to [0, 1].
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetFacts:
    """What a model needs to know about the data set it was trained on."""

    name: str  # also the tag of the weights: cifar10
    title: str  # as people write it: CIFAR-10
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...]  # in label order
    input_size: tuple[int, int, int] = (3, 32, 32)  # (channels, height, width)
    test_images: int = 10_000


_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""

DATASETS: dict[str, DatasetFacts] = {
    "cifar10": DatasetFacts(
        name="cifar10",
        title="CIFAR-10",
        mean=(0.49140, 0.48216, 0.44653),
        std=(0.24703, 0.24349, 0.26159),
        classes=tuple(_CIFAR10_CLASSES.split()),
    ),
    "cifar100": DatasetFacts(
        name="cifar100",
        title="CIFAR-100",
        mean=(0.50708, 0.48655, 0.44092),
        std=(0.26733, 0.25644, 0.27615),
        classes=tuple(_CIFAR100_CLASSES.split()),
    ),
}
