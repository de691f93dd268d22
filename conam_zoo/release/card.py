"""Model cards, written from the manifest and the recipes that it names."""

from conam_zoo.datasets import DATASETS
from conam_zoo.layers.confidence import EVEN
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
    return f"""---
license: {entry.licence.lower()}
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- conam
datasets:
- {entry.dataset}
metrics:
- accuracy
model-index:
- name: {entry.name}
  results:
  - task:
      type: image-classification
    dataset:
      name: {facts.title}
      type: {entry.dataset}
      split: test
    metrics:
    - type: accuracy
      name: Top-1 accuracy in percent
      value: {metrics.top1_percent:.2f}
---

# {entry.name}

{entry.arch} with ConAM, the confidence attention module, trained on {facts.title}. {status}

| measured on the {facts.title} test images | |
| --- | --: |
| top-1 | {metrics.top1_percent:.2f} % |
| top-5 | {metrics.top5_percent:.2f} % |
| NLL | {metrics.nll:.4f} |
| ECE (15 bins) | {metrics.ece:.4f} |
| parameters | {entry.params:,} |
| multiply-accumulates of one image | {entry.macs:,} |

The figures are those of this file, stored as {entry.dtype} and evaluated in float32 on all 10,000 test images, without
test-time augmentation. They are reproduced by `conam evaluate {entry.name} --data {entry.dataset}`.

## Usage

```python
import conam_zoo  # registers the models with timm
import timm

model = timm.create_model("{entry.name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

{by_repository}or, with nothing installed but the dependencies (`{code}` is where the code is kept):

```python
import torch

model = torch.hub.load("{code}", "{entry.arch}", pretrained=True, tag="{entry.tag}")
```

## Training

- Command: `conam train {entry.recipe} --data {entry.dataset} --output RUN --set seed={entry.seed}`
- {entry.epochs} epochs on {_training_images(entry)}, last epoch, seed {entry.seed}.
- How the recipe came about stands in the code's `docs/recipes.md`.
{taught}- {entry.train_minutes:.0f} minutes on {entry.hardware}, with {versions}.
- `log.csv` holds the log of every epoch:

![curves of the training](curves.png)

## Confidence maps

What the net makes of two photographs, and the confidence of each patch at every ConAM site.{strange} Photographs:
Frank-2.0, Stefan van der Walt, both CC0.

{_liveness(entry)}

![photographs, most probable classes, confidence maps](confidence.png)

## Limitations

Trained on 32 x 32 pictures of {len(facts.classes)} classes: larger pictures are scaled down, anything else than these
classes is classified as one of them, and the probabilities are not calibrated beyond what the ECE above says.

## Source

ConAM is described in Xue, Yuan and Neri, "ConAM: Confidence Attention Module for Convolutional Neural Networks",
arXiv 2110.14369v1, 2021; the authors withdrew the preprint in 2022. This is an independent reimplementation, and the
weights are this project's own.

```bibtex
@misc{{xue2021conam,
  title = {{ConAM: Confidence Attention Module for Convolutional Neural Networks}},
  author = {{Xue and Yuan and Neri}},
  year = {{2021}},
  eprint = {{2110.14369v1}},
  archivePrefix = {{arXiv}},
  note = {{withdrawn by the authors in 2022}}
}}
```
"""
