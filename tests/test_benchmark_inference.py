"""The ways to run a model give the same logits, and a way that is not there is named with its reason."""

import json
from pathlib import Path

import pytest
import timm
import torch

from experiments.speed import inference
from experiments.speed.inference import MODES, ModeUnavailableError, benchmark_inference, mode_call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet20_conam").to(memory_format=torch.channels_last).eval()


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("compiled")])
def test_every_way_gives_the_same_logits(net: torch.nn.Module, mode: str) -> None:
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    expected = net(images).detach()
    logits = torch.as_tensor(mode_call(net, images, mode)()).float()
    tolerance = 0.05 if mode.endswith("bf16") else 1e-4
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_compiled_net_is_the_one_that_is_timed(net: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def compile(module, **options):  # compiling takes half a minute and is PyTorch's to test
        asked.append(options)
        return lambda x: module(x) + 1

    monkeypatch.setattr(torch, "compile", compile)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(mode_call(net, images, "compiled fp32")(), net(images) + 1)
    assert asked == [{"dynamic": False}]


def test_a_compiler_that_is_missing_is_a_reason(net: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(module, **options):
        def fail(x):
            raise RuntimeError("no C++ compiler\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ModeUnavailableError, match=r"^torch\.compile fails: no C\+\+ compiler$"):
        mode_call(net, torch.randn(1, 3, 32, 32), "compiled fp32")


def test_a_quick_run_prints_ratios_to_eager_and_to_the_plain_twin(experiments, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inference, "is_installed", lambda package: package != "onnxruntime")
    monkeypatch.setattr(inference, "precision_on", lambda device: "bf16")
    code, out, _ = experiments("inference", "--quick", "--json", tmp_path / "inference.json")
    assert code == 0
    assert "relative to eager fp32" in out
    assert "not measured: onnx fp32" in out
    facts = json.loads((tmp_path / "inference.json").read_text())
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["eager fp32", "eager bf16", "plain, eager fp32", "plain, eager bf16"]
    assert rows["eager fp32"]["ratio"] == 1
    assert all(row["ratio_to"] == "eager fp32" for row in rows.values())
    assert [name for name, row in rows.items() if "ratio_to_plain" in row["facts"]] == ["eager fp32", "eager bf16"]
    for row in rows.values():
        assert row["facts"]["images_per_second"] == pytest.approx(2000 / row["median"], rel=1e-3)
    reasons = {(skip["name"], skip["reason"]) for skip in facts["skipped"]}
    reason = "onnxruntime not installed: pip install onnxruntime"
    assert reasons == {("onnx fp32", reason), ("plain, onnx fp32", reason)}


def test_bf16_is_left_out_where_it_is_slow_unless_it_is_asked_for(experiments, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inference, "is_installed", lambda package: False)
    monkeypatch.setattr(inference, "precision_on", lambda device: "fp32")
    code, out, _ = experiments("inference", "--quick", "--json", tmp_path / "inference.json")
    assert code == 0
    assert "no instructions for bf16 here: --mode 'eager bf16' measures it" in " ".join(out.split())
    facts = json.loads((tmp_path / "inference.json").read_text())
    assert [row["name"] for row in facts["rows"]] == ["eager fp32", "plain, eager fp32"]
    left = {skip["name"] for skip in facts["skipped"] if "no instructions" in skip["reason"]}
    assert left == {"eager bf16", "compiled bf16", "plain, eager bf16", "plain, compiled bf16"}
    asked = benchmark_inference(["resnet20_conam"], modes=["eager bf16"], quick=True)
    assert [row.name for row in asked.rows] == ["eager fp32", "eager bf16", "plain, eager fp32", "plain, eager bf16"]


def test_the_ratio_to_the_plain_twin_is_that_of_the_same_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"eager fp32": 4.0, "eager bf16": 3.0, "plain, eager fp32": 2.0, "plain, eager bf16": 1.0}
    monkeypatch.setattr(inference, "time_in_turns", lambda calls, **_: {name: [seconds[name]] for name in calls})
    record = benchmark_inference(["resnet20_conam"], batch=[8], modes=["eager bf16"], repeats=1)
    rows = {row.name: row for row in record.rows}
    assert {name: row.ratio for name, row in rows.items()} == {name: value / 4 for name, value in seconds.items()}
    assert rows["eager fp32"].facts == {"images_per_second": 2.0, "ratio_to_plain": 2.0}
    assert rows["eager bf16"].facts == {"images_per_second": 8 / 3, "ratio_to_plain": 3.0}
    assert rows["plain, eager bf16"].facts == {"images_per_second": 8.0}


BAD = {
    "model": (["resnet21_conam"], "did you mean resnet"),
    "mode": (["--mode", "eager fp64"], "The option --mode is eager fp64, but it must be one of eager fp32, "),
    "batch": (["--batch", "0"], "The option --batch is 0, but it must be at least 1."),
    "repeats": (["--repeats", "0"], "The option --repeats is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence(case: str, experiments) -> None:
    arguments, sentence = BAD[case]
    code, _, err = experiments("inference", "--quick", *arguments)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
