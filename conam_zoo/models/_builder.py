"""From a registered name to a model: timm's builder, with verified weights put in its hands.

timm decides which configuration, head, input channels and feature wrapper a call means; this file only answers the
question where the tensors come from. Whatever the source, they are read from safetensors by ``conam_zoo.weights`` and
passed on as a state dict, so nothing is unpickled and what was checked is what is loaded.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    clean_state_dict,
    generate_default_cfgs,
    resolve_pretrained_cfg,
)
from timm.models._builder import pretrained_cfg_for_features
from torch import Tensor, nn

from conam_zoo.datasets import DATASETS
from conam_zoo.models._base import StagedClassifier, attention_parameters
from conam_zoo.models.config_schema import as_json, check_trained_attention, load_config
from conam_zoo.weights import (
    Manifest,
    ManifestError,
    WeightEntry,
    WeightsError,
    find_verified,
    load_manifest,
    read_safetensors,
    read_verified,
)
from conam_zoo.weights.folder import WEIGHTS_FILE, at_commit_of, fetch_config, read_folder, read_hub_folder
from conam_zoo.weights.verify import check_values

ModelT = TypeVar("ModelT", bound=nn.Module)

# A namespace that the Hub refuses as a name: nobody can own it, and it is never contacted.
UNSET_NAMESPACE = "NAMESPACE--NOT--SET"


def dataset_cfgs(architectures: Mapping[str, Mapping[str, Any]]) -> dict[str, DefaultCfg]:
    """timm's default_cfgs: every architecture, with what of its configuration is its own, for every data set.

    A tag has weights if the manifest has an entry of that name; then the entry's facts are used.
    """
    try:
        manifest = load_manifest()
    except ManifestError:  # importing is no place to complain: loading weights reports it
        manifest = Manifest({})
    cfgs = {}
    for architecture, own in architectures.items():
        for tag, facts in DATASETS.items():
            cfg: dict[str, Any] = {
                "input_size": facts.input_size,
                "mean": facts.mean,
                "std": facts.std,
                "num_classes": len(facts.classes),
                "label_names": facts.classes,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "first_conv": "conv1",
                "classifier": "fc",
                "license": "apache-2.0",
                "paper_ids": "arXiv:2110.14369v1",
                **own,
            }
            entry = manifest.entries.get(f"{architecture}.{tag}")
            if entry is not None:
                cfg.update(_published(entry, manifest.hub_namespace))
            cfgs[f"{architecture}.{tag}"] = cfg
    return generate_default_cfgs(cfgs)


def _published(entry: WeightEntry, namespace: str | None) -> dict[str, Any]:
    """The part of timm's configuration that a manifest entry states."""
    hub_id = entry.hub_id(namespace or UNSET_NAMESPACE)
    return {
        "hf_hub_id": f"{hub_id}@{entry.revision}" if entry.revision else hub_id,
        "hf_hub_filename": entry.file,
        "input_size": tuple(entry.input_size),
        "mean": tuple(entry.mean),
        "std": tuple(entry.std),
        "num_classes": entry.num_classes,
        "label_names": tuple(entry.classes),
        "license": entry.licence.lower(),
    }


def build(
    model_cls: type[ModelT],
    variant: str,
    pretrained: bool,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    levels: int = 4,
    defaults: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> ModelT:
    """Make a model as timm's ``build_model_with_cfg`` does, with weights from a verified source.

    ``kwargs`` are ``features_only``, ``out_indices`` and the arguments of ``model_cls``, the class of the family, whose
    stem and stages are so many ``levels``; ``defaults`` are those of the builder, where they are not the class's.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    read_args = kwargs.get("pretrained_model_args")
    saved, pinned = _check_config(cfg, pretrained, read_args, pretrained_cfg_overlay or {}, cache_dir)
    manifest = load_manifest() if pretrained else Manifest({})
    entry = None if cfg.source in ("local-dir", "hf-hub") else manifest.entries.get(f"{variant}.{cfg.tag}")
    kwargs = {**(defaults or {}), **(entry.model_args if entry else {}), **saved, **kwargs}
    overlay = dict(pretrained_cfg_overlay or {})
    asked = overlay.get("hf_hub_filename")
    if pretrained and asked and asked not in (WEIGHTS_FILE, entry.file if entry else None):
        raise WeightsError(
            f"hf_hub_filename is {asked!r}, but the file of a repository is the one that its config.json names as "
            "weights_file: leave it out."
        )
    config = None
    if pretrained:
        tensors, config = _state_dict(f"{variant}.{cfg.tag}", pinned, manifest, entry, cache_dir)
        overlay |= {"state_dict": tensors, "source": None}
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        feature_cfg={"out_indices": tuple(range(levels))},
        pretrained_filter_fn=partial(_fitting, variant=variant, cfg=cfg, config=config),
        cache_dir=cache_dir,
        **kwargs,
    )
    stated = replace(cfg, state_dict=None).to_dict()  # what was asked for, without the tensors
    stated = pretrained_cfg_for_features(stated) if kwargs.get("features_only") else stated
    for net in (model, *(inner for inner in model.children() if hasattr(inner, "pretrained_cfg"))):
        net.pretrained_cfg = net.default_cfg = stated
    if kwargs.get("features_only"):  # timm's wrappers hide the net's own
        model.no_weight_decay = partial(attention_parameters, model)
    if entry and entry.model_args:
        model._model_args = dict(entry.model_args)  # which timm rebuilds a net from, with the caller's arguments
    return model


def _check_config(
    cfg: PretrainedCfg,
    pretrained: bool,
    read_args: Mapping[str, Any] | None,
    overlay: Mapping[str, Any],
    cache_dir: str | Path | None,
) -> tuple[dict[str, Any], PretrainedCfg]:
    """Refuse the config.json that timm has read if anything is wrong with it; gives the arguments that it states.

    With them goes the configuration, a Hub repository in it pinned to the commit that the config.json is of.
    timm takes the one in the Hub cache as it is. Here a damaged one is fetched anew, and what was read from it is not
    used. ``read_args`` are None where timm read none, since a net's ``pretrained_cfg`` was passed instead of its name.
    """
    if cfg.source == "local-dir" and cfg.file:
        config = load_config(Path(cfg.file))
    elif cfg.source == "hf-hub" and cfg.hf_hub_id and pretrained:
        fetched = fetch_config(cfg.hf_hub_id, cache_dir)
        config = load_config(fetched.parent)
        stated = config["pretrained_cfg"] | {k: config[k] for k in ("num_classes", "label_names") if k in config}
        keys = {"num_classes", "label_names", "input_size", "mean", "std"} & stated.keys() - overlay.keys()
        same = all(as_json(getattr(cfg, key)) == stated[key] for key in keys)
        if not same or (read_args is not None and dict(read_args) != config.get("model_args", {})):
            raise WeightsError(
                f"The config.json of {cfg.hf_hub_id} in the Hub cache was damaged, and is fetched anew now: open the "
                "model again."
            )
        cfg = replace(cfg, hf_hub_id=at_commit_of(fetched, cfg.hf_hub_id))
    else:
        return {}, cfg
    return config.get("model_args", {}), cfg


def _fitting(
    state_dict: dict[str, Tensor], model: nn.Module, variant: str, cfg: PretrainedCfg, config: Path | None
) -> dict[str, Tensor]:
    """The tensors, a half precision stem in float32, if the body of the model has exactly those.

    timm drops the head of another class count and then loads without strictness; this keeps a file of another net from
    passing as one of this. ``config`` is a config.json that says how they were trained.
    """

    def misfit(what: str) -> WeightsError:
        return WeightsError(f"These weights do not fit {variant} as asked for, {what}.")

    remedy = "ask for the net and the attn arguments that they were trained with"
    num_classes, in_chans = cfg.num_classes, cfg.input_size[0]
    if config is not None and isinstance(model, StagedClassifier):
        check_trained_attention(config, model.attention_arguments())
    own = model.state_dict()
    head, stem = ("fc.weight", "fc.bias"), "conv1.weight"
    for name in sorted(set(own) ^ set(state_dict)):
        if name not in head:
            where = "have no" if name in own else "have a"
            raise misfit(f"they {where} tensor {name}: {remedy}")
    for name, tensor in state_dict.items():
        if name in own and name not in (*head, stem) and tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} and not {tuple(own[name].shape)}"
            raise misfit(f"their {name} has shape {shapes}: {remedy}")
    channels = state_dict[stem].shape[1] if stem in state_dict and state_dict[stem].ndim == 4 else in_chans
    if channels != in_chans:
        raise misfit(
            f"they take {channels} channels and its configuration says {in_chans}: give the input_size that they were "
            "trained with in pretrained_cfg_overlay"
        )
    found = len(state_dict[head[0]]) if head[0] in state_dict else num_classes
    if found != num_classes:
        raise misfit(
            f"they have {found} classes and its configuration says {num_classes}: give num_classes={found} in "
            "pretrained_cfg_overlay if these are the right weights"
        )
    if head[0] in own and model.num_classes == num_classes:  # else timm leaves the head out
        for name in head:
            if name not in state_dict or state_dict[name].shape != own[name].shape:
                found_shape = f"shape {tuple(state_dict[name].shape)}" if name in state_dict else "none"
                raise misfit(
                    f"its {name} has shape {tuple(own[name].shape)} and theirs has {found_shape}: use weights with a "
                    "head, or num_classes=0"
                )
    # timm sums or repeats the stem's channels for other images, in the type of the file.
    return {**state_dict, stem: state_dict[stem].float()} if stem in state_dict else state_dict


def _state_dict(
    name: str, cfg: PretrainedCfg, manifest: Manifest, entry: WeightEntry | None, cache_dir: str | Path | None
) -> tuple[dict[str, Tensor], Path | None]:
    """The tensors that a configuration names, verified wherever a hash is known, and a config.json that says more.

    A source of the caller's own comes first: a folder, a Hub repository, a state dict, a file. A file given for a
    name that the manifest knows has to be the published one.
    """
    if cfg.source == "local-dir" and cfg.file:
        return read_folder(Path(cfg.file)), None
    if cfg.source == "hf-hub" and cfg.hf_hub_id:
        namespace = manifest.hub_namespace
        for known in manifest.entries.values():  # the commit that the manifest pins is held to the manifest
            if namespace and cfg.hf_hub_id == f"{known.hub_id(namespace)}@{known.revision}":
                return find_verified(known, cache_dir=cache_dir, namespace=namespace).state_dict, None
        return read_hub_folder(cfg.hf_hub_id, cache_dir), None
    if cfg.state_dict:
        try:
            check_values(tensors := clean_state_dict(cfg.state_dict))  # of a wrapper's prefix
        except ValueError as error:
            raise WeightsError(f"The state dict for {name} is refused ({error}): pass trained weights.") from error
        return dict(tensors), None
    if cfg.file:
        path = Path(cfg.file)
        return read_verified(path, entry) if entry else read_safetensors(path), path.with_name("config.json")
    if cfg.url:
        raise WeightsError(f"Weights are not read from a URL ({cfg.url}): download the file, and name it with 'file'.")
    if cfg.hf_hub_id and (entry is None or cfg.hf_hub_id != _published(entry, manifest.hub_namespace)["hf_hub_id"]):
        config = fetch_config(cfg.hf_hub_id, cache_dir)
        return read_hub_folder(at_commit_of(config, cfg.hf_hub_id), cache_dir), config
    if entry is None:
        have = ", ".join(sorted(manifest.entries)) or "none yet"
        raise WeightsError(
            f"There are no pretrained weights for {name}: choose one that has them ({have}), or pass pretrained=False."
        )
    return find_verified(entry, cache_dir=cache_dir, namespace=manifest.hub_namespace).state_dict, None
