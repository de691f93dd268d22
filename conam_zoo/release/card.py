"""Model cards, written from the manifest and the recipes that it names."""

from importlib.resources import files

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from conam_zoo.datasets import DATASETS
from conam_zoo.escape import for_markdown
from conam_zoo.layers.confidence import EVEN
from conam_zoo.release.peers import best_peer, like_for_like
from conam_zoo.training.recipe import list_recipes, load_recipe
from conam_zoo.weights import Manifest, WeightEntry

__all__ = ["even_sites", "model_card"]


def even_sites(entry: WeightEntry) -> list[str]:
    """The sites whose ConAM gives all patches about the same confidence, as far as it was measured."""
    return [site for site, alive in (entry.liveness or {}).items() if alive < EVEN]


def _liveness(entry: WeightEntry) -> str:
    """What was measured of the confidences, as a paragraph."""
    if entry.liveness is None:
        return "How much the confidences differ between patches was not measured for these weights."
    if not entry.liveness:
        return "The net has no ConAM."
    values = ", ".join(f"{alive:.4f} at `{site}`" for site, alive in entry.liveness.items())
    text = (
        "Standard deviation of the confidences over the patches, divided by their mean, averaged over 256 training "
        f"images: {values}."
    )
    if even := even_sites(entry):
        sites = " and ".join(f"`{site}`" for site in even)
        text += (
            f" **At {sites} the confidences are even**: they differ by less than {EVEN:.0%}, so that the module there "
            "has practically no effect on these weights."
        )
    return text


def _training_images(entry: WeightEntry) -> str:
    """What the epochs showed of the training images."""
    recipe = load_recipe(entry.recipe) if entry.recipe in list_recipes() else None
    if recipe is None or not recipe.early_epochs:
        return "all 50,000 training images"
    side = recipe.early_size
    return f"all 50,000 training images, the first {recipe.early_epochs} on random {side} x {side} crops of them"


def model_card(entry: WeightEntry, manifest: Manifest, namespace: str | None = None) -> str:
    """The README.md of a Hub repository, in Markdown with the Hub's metadata block.

    It does not name the commit that it is part of: that is known only afterwards, and stands in the manifest.

    Args:
        entry: The weights.
        manifest: The manifest that they stand in.
        namespace: The account that they are about to be published by; None: write what is so now.
    """
    facts = DATASETS[entry.dataset]
    metrics = entry.metrics
    taught = f"- Distilled from `{entry.teacher}`, whose outputs on the same images it learnt from as well.\n"
    taught = taught if entry.teacher else ""
    if namespace is None and entry.revision is not None:
        namespace = manifest.hub_namespace
    code = manifest.code_repository or "OWNER/REPOSITORY"
    status = (
        f"Published as `{entry.hub_id(namespace)}`; the code pins the commit in `weights_manifest.json`."
        if namespace
        else "Not published on the Hub yet: the publishing account is still to be set in `weights_manifest.json`."
    )
    by_repository = (
        f'or by repository, `timm.create_model("hf-hub:{entry.hub_id(namespace)}", pretrained=True)`, or\n\n'
        if namespace
        else ""
    )
    strange = "" if {"bird", "cat"} & set(entry.classes) else f" {facts.title} has no class for either of them."
    versions = ", ".join(f"{library} {version}" for library, version in sorted(entry.library_versions.items()))
    data = ModelCardData(
        license=entry.licence.lower(),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "conam"],
        datasets=[entry.dataset],
        metrics=["accuracy"],
        model_name=entry.name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=entry.dataset,
                dataset_name=facts.title,
                dataset_split="test",
                metric_type="accuracy",
                metric_name="Top-1 accuracy in percent",
                metric_value=round(metrics.top1_percent, 2),
            )
        ],
    )
    usual, best = like_for_like(entry.arch, entry.dataset), best_peer(entry.arch, entry.dataset)
    card = ModelCard.from_template(
        data,
        template_str=files("conam_zoo.release").joinpath("card_template.md").read_text(encoding="utf-8"),
        entry=entry,
        facts=facts,
        status=status,
        by_repository=by_repository,
        code=code,
        strange=strange,
        taught=taught,
        peers=[
            (label, peer.to_markdown())
            for label, peer in (("usual recipe elsewhere", usual), ("best known elsewhere", best))
            if peer is not None
        ],
        hardware=for_markdown(entry.hardware),
        versions=for_markdown(versions),
        training_images=_training_images(entry),
        liveness=_liveness(entry),
    )
    return str(card).rstrip() + "\n"
