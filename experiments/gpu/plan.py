"""What is trained on the GPU: the table of the zoo's weights, in order of priority."""

import hashlib
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.training.checkpoint import has_checkpoint
from conam_zoo.training.recipe import Recipe, load_recipe
from conam_zoo.training.teacher_bank import SETTINGS

# Weights, teachers first; the plain twins are kept as records. With each, the suffixes of its two recipes' names: that
# for the campaign on two cores, and the long one.
NETS = {
    "wide_resnet16_4_conam.cifar100": ("", ""),
    "wide_resnet16_4_conam.cifar10": ("", ".long"),
    "resnet20_conam.cifar100": (".campaign", ".long"),
    "resnet20_conam.cifar10": (".campaign", ".long"),
    "resnet18_conam.cifar10": ("", ""),
    "resnet56_conam.cifar100": ("", ""),
    "resnet56_conam.cifar10": (".campaign", ".long"),
    "resnet20_conam.cifar100 plain": (".campaign", ".long"),
    "resnet20_conam.cifar10 plain": (".campaign", ".long"),
    "resnet18_conam.cifar100": ("", ""),
    "resnet32_conam.cifar10": ("", ""),
    "resnet32_conam.cifar100": ("", ""),
    "resnet44_conam.cifar10": ("", ""),
    "resnet44_conam.cifar100": ("", ""),
    "densenet40_12_conam.cifar10": (".long", ".long"),
    "densenet40_12_conam.cifar100": ("", ""),
}
LENGTHS = ("campaign", "long")
PLAIN = 'model_args={attn_layer = "none"}'


@dataclass(frozen=True)
class Task:
    """One process."""

    name: str  # also that of its log
    dataset: str  # the data set that it reads
    command: Callable[[], list[str]]  # gives it as things are now: with ``--resume`` if there is something to resume
    done: Path  # a file that is there once it is done
    needs: tuple[str, ...] = ()  # tasks that have to be done before
    run: Path | None = None  # the run folder, of a training


def plan_tasks(
    work: Path,
    *,
    nets: Collection[str] = tuple(NETS),
    length: str = "campaign",
    bank_epochs: int = 100,
    compile: bool = False,
) -> list[Task]:
    """All tasks in the order in which they start: teachers, their packing, banks of their logits, the other nets.

    ``work`` is the folder of the campaign: ``code``, ``data``, ``runs``, ``banks``, ``logs``. ``nets`` are some of
    ``NETS``, and ``length``, one of ``LENGTHS``, says by which of its recipes a net is trained. A teacher that is not
    among ``nets`` stays in the plan if an earlier call has trained it; else it is the one whose weights the code has. A
    bank has at most ``bank_epochs``, and students with more epochs start it over, which is refused for an odd number,
    since every image is shown both ways in two epochs.
    """
    if unknown := [net for net in nets if net not in NETS]:
        raise UserError(f"{unknown[0]!r} is not in the table: choose among {', '.join(NETS)}.")
    if length not in LENGTHS:
        raise UserError(f"The option --length is {length!r}, but it must be {' or '.join(LENGTHS)}.")
    chosen = {net: _recipe(work, net, length) for net in NETS if net in nets}
    # Teachers of an earlier call stay in the plan, so that their students read the same banks whoever else is named.
    wanted = {recipe.teacher for _, recipe in chosen.values()}
    earlier = {teacher for teacher in wanted & set(NETS) if _is_trained(work, teacher, length)}
    chosen = {net: _recipe(work, net, length) for net in NETS if net in {*nets, *earlier}}
    taught = {recipe.teacher for _, recipe in chosen.values() if recipe.teacher} & set(chosen)
    teachers: list[Task] = []
    students: list[Task] = []
    banks: dict[str, str] = {}
    for net, (name, recipe) in chosen.items():
        run = work / "runs" / f"{name}{'.plain' if net.endswith(' plain') else ''}"
        needs: tuple[str, ...] = ()
        options = ["--set", PLAIN] if net.endswith(" plain") else []
        if recipe.teacher:
            shown = _shown(recipe)
            origin = "own" if recipe.teacher in taught else "shipped"
            digest = hashlib.sha256(f"{shown} {origin}".encode()).hexdigest()
            bank = banks.setdefault(shown, f"{recipe.teacher}.bank-{digest[:8]}")
            needs, options = (bank,), [*options, "--teacher-bank", str(work / "banks" / bank)]
        options += ["--compile"] if compile else []
        task = Task(net, recipe.dataset, _train(work, name, recipe, run, options), run / "run.json", needs, run)
        (teachers if net in taught else students).append(task)
    packing = [_pack(work, task) for task in teachers]
    recording = []
    for shown, bank in banks.items():
        pupils = [(name, recipe) for name, recipe in chosen.values() if recipe.teacher and _shown(recipe) == shown]
        longest = max(recipe.epochs for _, recipe in pupils)
        if bank_epochs < longest and bank_epochs % 2:
            raise UserError(
                f"The option --bank-epochs is {bank_epochs}, but a bank that is passed again needs an even number, "
                "since every image is shown both ways in two epochs."
            )
        epochs = min(bank_epochs, longest)
        needs = (f"{pupils[0][1].teacher} packed",) if pupils[0][1].teacher in taught else ()
        recording.append(_record(work, bank, epochs, needs, *pupils[0]))
    return [*teachers, *packing, *recording, *students]


def _recipe(work: Path, net: str, length: str) -> tuple[str, Recipe]:
    """Name and content of a net's recipe, as the campaign's own copy of the code has it."""
    name = net.removesuffix(" plain") + NETS[net][LENGTHS.index(length)]
    settings = [PLAIN] if net.endswith(" plain") else []
    return name, load_recipe(str(work / "code" / "conam_zoo" / "training" / "recipes" / f"{name}.toml"), settings)


def _is_trained(work: Path, net: str, length: str) -> bool:
    return (work / "runs" / _recipe(work, net, length)[0] / "run.json").is_file()


def _shown(recipe: Recipe) -> str:
    """What the images and the teacher's answers to them depend on: recipes that agree in it share a bank."""
    values = recipe.to_dict()
    return repr([values[key] for key in SETTINGS])


def _conam(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "conam_zoo", *map(str, arguments)]


def _train(work: Path, name: str, recipe: Recipe, run: Path, options: list[str]) -> Callable[[], list[str]]:
    def command() -> list[str]:
        resume = ["--resume"] if has_checkpoint(run) else []
        places = ["--data", work / "data" / recipe.dataset, "--output", run, "--checkpoint-minutes", 2]
        return _conam("train", name, *places, *options, *resume)

    return command


def _pack(work: Path, teacher: Task) -> Task:
    """Students name their teacher as the manifest does, so that their recipes are those of the package."""
    arguments = ("pack", teacher.run, "--data", work / "data" / teacher.dataset, "--allow-even-sites")
    done = work / "code" / f"{teacher.name}.packed"  # beside the manifest that it is packed into
    return Task(f"{teacher.name} packed", teacher.dataset, lambda: _conam(*arguments), done, (teacher.name,))


def _record(work: Path, bank: str, epochs: int, needs: tuple[str, ...], name: str, recipe: Recipe) -> Task:
    folder = work / "banks" / bank
    places = ("--data", work / "data" / recipe.dataset, "--output", folder, "--epochs", epochs)
    return Task(bank, recipe.dataset, lambda: _conam("record-teacher", name, *places), folder / f"{epochs}.done", needs)
