"""The ``tdc`` command, as a user or a script meets it.

Most tests call the command in this process, which is quick; exit statuses and the absence of
tracebacks are looked at from outside, in a few.
"""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import tdc_tvm
from tdc_tvm import cli
from tdc_tvm.errors import TdcError


def tdc(*arguments, width=100):
    """Run the command here; a `TdcError` is raised as it is."""
    console = (cli.console.width, cli.messages.width)
    cli.console.width = cli.messages.width = width
    try:
        result = CliRunner().invoke(
            cli.main, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"}
        )
    finally:
        cli.console.width, cli.messages.width = console
    assert result.exit_code == 0, result.output
    return result.stdout


def from_outside(*arguments, **environment):
    command = [sys.executable, "-m", "tdc_tvm", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"} | environment
    )


def test_the_main_job(model_path, tmp_path, x, y):
    small, library, plan = tmp_path / "small.onnx", tmp_path / "small.so", tmp_path / "plan.json"
    text = tdc("compress", model_path, "--ranks", "2,2", "--output", small, "--save-plan", plan)
    assert "1 of 3 convolutions decomposed" in text
    assert f"wrote {small}" in text
    assert set(json.loads(plan.read_text())) >= {"layers"}

    text = tdc("build", small, "--target", "llvm", "--output", library)
    assert "verification against ONNX Runtime passed" in text
    assert f"wrote {library}" in text

    np.save(tmp_path / "x.npy", x)
    text = tdc("run", library, "--input", tmp_path / "x.npy", "--output", tmp_path / "out.npz")
    assert "1x8x6x6" in text
    with np.load(tmp_path / "out.npz") as results:
        np.testing.assert_array_equal(results["y"], tdc_tvm.load(library).run(x))

    assert "verified: y differs by" in tdc("verify", library, small)
    assert "verification against ONNX Runtime passed" in tdc("inspect", library)
    table = tdc("bench", library, small, "--target", "llvm", "--repeat", 2, "--warmup", 0, "--tvm-default")
    assert "small.onnx, ONNX Runtime" in table
    assert "small.onnx, TVM" in table
    with pytest.raises(TdcError, match="verification failed: output 'y' differs from ONNX Runtime"):
        tdc("verify", library, model_path)


def test_json_goes_to_standard_output_alone(model_path, library, tmp_path):
    output = tmp_path / "m.so"
    data = json.loads(tdc("build", model_path, "-t", "llvm", "-o", output, "--json"))
    assert data["output"] == str(output)
    assert [layer["fused"] for layer in data["layers"]] == [True]
    assert json.loads(tdc("inspect", library, "--json"))["kind"] == "llvm"
    assert json.loads(tdc("inspect", model_path, "-t", "sm_80", "--json"))["device"] == "A100"
    assert json.loads(tdc("verify", library, model_path, "--json"))["status"] == "passed"
    assert json.loads(tdc("run", library, "--json"))["outputs"][0]["shape"] == [1, 8, 6, 6]
    assert json.loads(tdc("env", "--json"))["tdc-tvm"] == tdc_tvm.__version__
    bench = json.loads(tdc("bench", library, "--repeat", 3, "--json"))
    assert len(bench["results"][0]["samples_ms"]) == 3
    assert bench["environment"]["apache-tvm"]
    compressed = json.loads(tdc("compress", model_path, "-r", "2,2", "-o", tmp_path / "c.onnx", "--json"))
    assert compressed["parameters"][1] < compressed["parameters"][0]


def test_json_has_no_numbers_that_json_lacks(library, tmp_path, x):
    np.save(tmp_path / "x.npy", np.full_like(x, np.inf))
    text = tdc("run", library, "-i", tmp_path / "x.npy", "--json")
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["outputs"][0]["max"] is None or np.isfinite(strict["outputs"][0]["max"])


def test_inputs_by_name_and_outputs_of_any_name(two_inputs, tmp_path):
    library = tmp_path / "two.so"
    two_inputs.export_library(library)
    a, scale = np.ones((2, 3), np.float32), np.array(3, np.float32)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "scale.npy", scale)
    named = ("-i", f"in/put.1={tmp_path / 'a.npy'}", "-i", f"self={tmp_path / 'scale.npy'}")
    tdc("run", library, *named, "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as results:
        assert sorted(results.files) == ["file", "out:0"]
        np.testing.assert_array_equal(results["file"], 3 * a)
    with pytest.raises(TdcError, match=r"inputs in/put.1, self; write --input NAME=FILE.npy for each"):
        tdc("run", library, "-i", tmp_path / "a.npy")
    with pytest.raises(TdcError, match="input 'self' is given twice"):
        tdc("run", library, *named, *named[2:])
    with pytest.raises(TdcError, match=r"missing input\(s\) self"):
        tdc("run", library, *named[:2])


def test_a_dynamic_batch_is_frozen(tucker_model, tmp_path):
    onnx.save(tucker_model(batch="n"), tmp_path / "m.onnx")
    with pytest.raises(TdcError, match=r"dynamic shape .* pass batch=1"):
        tdc("build", tmp_path / "m.onnx", "-o", tmp_path / "m.so")
    for flags in (("--batch", 2), ("--input-shape", "x:2x8x6x6")):
        tdc("build", tmp_path / "m.onnx", "-o", tmp_path / "m.so", "-t", "llvm", *flags)
        assert tdc_tvm.load(tmp_path / "m.so").inputs[0].shape == (2, 8, 6, 6)


def test_several_batch_sizes(tucker_model, tmp_path):
    model, library = tmp_path / "m.onnx", tmp_path / "m.so"
    onnx.save(tucker_model(batch="n"), model)
    sizes = ("--batch", 1, "--batch", 3)
    assert "batch 3: " in tdc("inspect", model, "-t", "llvm", *sizes)
    data = json.loads(tdc("build", model, "-o", library, "-t", "llvm", *sizes, "--json"))
    assert [data["batch"], *(report["batch"] for report in data["further"])] == [1, 3]
    text = tdc("inspect", library)
    assert "batch 1 (main): input x: float32[1, 8, 6, 6]" in text
    assert "batch 3 (main_3): output y: float32[3, 8, 6, 6]" in text
    assert "batch 1: y differs by" in tdc("verify", library, model)

    np.save(tmp_path / "x.npy", np.ones((2, 8, 6, 6), np.float32))
    done = from_outside("run", library, "-i", tmp_path / "x.npy")
    assert "2x8x6x6" in done.stdout
    assert done.stderr.startswith("note: a batch of 2 runs as one of 3, filled up with zeros; the model was built for")
    assert len(done.stderr.splitlines()) == 1

    quick = ("--repeat", 1, "--warmup", 0)
    names = [result["name"] for result in json.loads(tdc("bench", library, *quick, "--json"))["results"]]
    assert names == ["m.so, batch 1", "m.so, batch 3"]
    text = tdc("bench", library, model, "-t", "llvm", "--batch", 3, *quick)
    for name in ("m.so, batch 3", "m.onnx, tdc_tvm ", "m.onnx, ONNX Runtime "):
        assert name in text
    with pytest.raises(TdcError, match="found batch=2; the model was built for batches of 1, 3; leave batch"):
        tdc("bench", library, "--batch", 2, *quick)
    with pytest.raises(TdcError, match=r"--batch is for ONNX models; .* batches of 1, 3"):
        tdc("inspect", library, "--batch", 3)
    with pytest.raises(TdcError, match="--tvm-default needs an ONNX model"):
        tdc("bench", library, "--tvm-default")
    with pytest.raises(TdcError, match=r"batch is \[2, 2\]; expected a whole number from 1 on"):
        tdc("build", model, "-o", library, "--batch", 2, "--batch", 2)


COMPRESS = ("compress", "{model}", "-r", "2,2", "-o", "{tmp}/m.onnx", "--save-plan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "{model}", "-o", "{tmp}/m"), r"ends in \.so; found"),
        (("build", "{model}", "-o", "{tmp}/absent/m.so"), "does not exist; create it first"),
        (("build", "{model}", "-o", "{tmp}/m.so", "-t", "gpu"), "unknown target 'gpu'"),
        (("build", "{model}", "-o", "{tmp}/m.so", "--input-shape", "1x8x6x6"), "expected NAME:1x3x224x224"),
        (("build", "{model}", "-o", "{tmp}/m.so", "--input-shape", "x:1xbx6x6"), "expected NAME:1x3x224x224"),
        (("build", "{model}", "-o", "{tmp}/m.so", "-t", "llvm", "--atol", "0", "--rtol", "0"), "verification failed"),
        (("run", "{library}", "-i", "{tmp}/absent.npy"), "cannot read .*absent.npy: No such file"),
        (("run", "{library}", "-i", "{model}"), "is not a .npy file"),
        (("run", "{library}", "-i", "z={tmp}/absent.npy"), "cannot read"),
        (("run", "{model}"), "is not a shared library"),
        (("inspect", "{tmp}/absent.so"), "cannot read .*absent.so: No such file"),
        (("inspect", "{tmp}/absent.onnx"), "cannot read the model .*absent.onnx"),
        (("bench", "{tmp}"), "cannot read the model .*directory"),
        (("compress", "{model}", "-r", "many", "-o", "{tmp}/m.onnx"), "many"),
        (("compress", "{model}", "-r", "2,2", "-o", "{tmp}/absent/m.onnx"), "create it first"),
        (("compress", "{model}", "-r", "2,2", "-o", "{model}"), "would be lost"),
        (("compress", "{model}", "-r", "2,2", "-o", "{tmp}/m"), r"ends in \.onnx"),
        ((*COMPRESS, "{tmp}/m.txt"), r"ends in \.json or \.yaml or \.yml"),
        ((*COMPRESS, "{tmp}/absent/m.json"), "create it first"),
        ((*COMPRESS, "{tmp}/m.onnx"), "ends in"),
        (("run", "{library}", "-o", "{library}"), r"ends in \.npz"),
        (("run", "{library}", "-i", "{tmp}/x.npz", "-o", "{tmp}/x.npz"), "x.npz would be lost"),
        (("run", "{library}", "-i", "x={tmp}/x.npz", "-o", "{tmp}/x.npz"), "x.npz would be lost"),
        (("build", "{model}", "-o", "/proc/m.so"), "cannot write /proc/m.so"),
    ],
)
def test_mistakes_are_errors_of_ours_and_leave_nothing(model_path, library, tmp_path, arguments, message):
    filled = [a.format(model=model_path, library=library, tmp=tmp_path) for a in arguments]
    with pytest.raises(TdcError, match=message):
        tdc(*filled)
    assert not os.listdir(tmp_path)
    assert onnx.load(model_path).graph.node
    assert library.read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("width", [80, 160])
def test_output_fits_the_terminal(model_path, library, tmp_path, monkeypatch, width):
    monkeypatch.setattr(cli, "environment", lambda: {"gpu arch": "sm_90", "cuda compiler": f"nvcc (/{'p' * 200})"})
    model = onnx.load(model_path)
    model.graph.node[1].name = "a.very.long.name.[of].a.layer.deep.in.the.backbone.of.the.net/conv2"
    onnx.save(model, tmp_path / "m.onnx")
    texts = [
        tdc("inspect", tmp_path / "m.onnx", "-t", "llvm", width=width),
        tdc("compress", tmp_path / "m.onnx", "-r", "2,2", "-o", tmp_path / "c.onnx", width=width).split("parameters")[
            0
        ],
        tdc("inspect", library, width=width),
        tdc("env", width=width),
        tdc("bench", tmp_path / "m.onnx", library, "-t", "llvm", "--warmup", 1, "--repeat", 1, width=width),
    ]
    for text in texts:
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
    assert "[of]" in "".join(texts[0].split())


def test_a_mistake_from_outside(tmp_path):
    done = from_outside("run", tmp_path / "absent [bold].so")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: cannot read {tmp_path}/absent [bold].so: No such file or directory\n"


def test_success_from_outside_writes_nothing_to_standard_error(model_path, tmp_path):
    done = from_outside("build", model_path, "-o", tmp_path / "m.so", "--target", "llvm", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["output"] == str(tmp_path / "m.so")


def test_the_version():
    assert tdc("--version") == f"tdc_tvm {tdc_tvm.__version__}\n"


def test_a_library_is_verified_with_its_own_model(library, two_inputs, tmp_path):
    from conftest import make_two_input_model

    onnx.save(make_two_input_model(), tmp_path / "two.onnx")
    with pytest.raises(TdcError, match=r"tiny.so takes the inputs x, .*two.onnx takes in/put.1, self; expected the"):
        tdc("verify", library, tmp_path / "two.onnx")
    model = make_two_input_model()
    two_inputs.export_library(tmp_path / "two.so")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("out:0", 1, (3, 3)))
    onnx.save(model, tmp_path / "wide.onnx")
    with pytest.raises(TdcError, match=r"two.so was not built from .*wide.onnx: input 'in/put.1' is declared as"):
        tdc("verify", tmp_path / "two.so", tmp_path / "wide.onnx")


@pytest.mark.parametrize("flags", [("--seed", -1), ("--taget", "llvm")])
def test_a_wrong_flag_is_explained(flags):
    arguments = ["build", "m.onnx", "-o", "m.so", *map(str, flags)]
    result = CliRunner().invoke(cli.main, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert flags[0] in result.output


@pytest.mark.parametrize("command", ["plan", "compress", "tune", "build", "run", "verify", "bench", "inspect", "env"])
def test_every_command_has_help_that_fits(command):
    result = CliRunner().invoke(cli.main, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "…" not in result.output
