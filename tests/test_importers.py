"""Every source's layout, written here from random weights, against the source's own formulas."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patchsae.command import main
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.importers import (
    Project,
    check_import,
    export_saelens,
    fold_input,
    import_sae,
)
from patchsae.sae.model import SAE, Activation, SAEConfig

D_IN, D_SAE, K = 12, 48, 5


def tokens(n=64, scale=5.0):
    """Draw tokens large enough for the epsilon of a layer norm to be lost in float32."""
    return scale * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(7)) + 1


def weights():
    draw = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=draw) / 3 for name, shape in shapes.items()}


def linear(w, bias="b_dec"):
    """Name the weights as nn.Linear does, which stores them the other way round."""
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        bias: w["b_dec"],
    }


def pre_activations(w, x, subtract=True):
    return (x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"]


def top(z, k=K):
    """Keep the k largest of each token, if positive."""
    return torch.where(z >= z.topk(k).values[:, -1:], z, 0).relu()


def decode(w, f):
    return f @ w["W_dec"] + w["b_dec"]


def assert_computes(sae, x, f, x_hat):
    assert (f > 0).any() and (f == 0).any()
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), x_hat, rtol=1e-5, atol=1e-5)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """Write a .pt whose configuration is of a class that only exists while it is written."""

    def write(w, key="cfg", module="src.sae_training.config", name="ViTSAERunnerConfig", **fields):
        cls = type(name, (), {"__module__": module})
        config, parts = cls(), module.split(".")
        modules = [types.ModuleType(".".join(parts[: n + 1])) for n in range(len(parts))]
        setattr(modules[-1], name, cls)
        d_in = len(next(value for name, value in w.items() if name.endswith("b_dec")))
        size = {"d_in": d_in, "expansion_factor": 4, "d_sae": 4 * d_in}
        rest = {
            "device": torch.device("cuda"),
            "dtype": torch.float32,
            "store_size": None,
            "more": [config],
        }
        vars(config).update(size | rest | {"gated_sae": False} | fields)
        with monkeypatch.context() as patch:
            for each in modules:
                patch.setitem(sys.modules, each.__name__, each)
            torch.save({key: config, "state_dict": w}, tmp_path / "out.pt")
        return tmp_path / "out.pt"

    return write


def write_saelens(folder, w, threshold=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    state = w if threshold is None else w | {"threshold": threshold}
    save_file(state, folder / "sae_weights.safetensors")
    base = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    write_json(folder / "cfg.json", base | {"metadata": {"sae_lens_version": "6.54.12"}} | config)
    return folder


def write_saev(file, header, state):
    with file.open("wb") as stream:
        stream.write(json.dumps(header).encode() + b"\n")
        torch.save(state, stream)
    return file


def write_sparsify(folder, w, **config):
    folder.mkdir(parents=True, exist_ok=True)
    state = linear(w) | {"W_dec": w["W_dec"]}
    state.pop("decoder.weight")
    save_file(state, folder / "sae.safetensors")
    base = {"d_in": D_IN, "num_latents": D_SAE, "k": K, "activation": "topk", "transcode": False}
    write_json(folder / "cfg.json", base | config)
    return folder


def write_prisma(folder, state, name="weights.pt", **config):
    device = {"__type__": "torch.device", "value": "cuda"}
    base = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "device": device}
    base |= {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "normalize_activations": "none"}
    write_json(folder / "config.json", base | config)
    torch.save(state, folder / name)
    return folder


def write_dictionary(folder, state, dict_class, **trainer):
    base = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    write_json(folder / "config.json", {"trainer": base | trainer, "buffer": {"d_submodule": D_IN}})
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("key", ["cfg", "config"])
@pytest.mark.parametrize("module", ["src.sae_training.config", "sae_training.config"])
def test_the_authors_file(authors, key, module):
    w, x = weights(), tokens()
    values = {"l1_coefficient": 8e-5, "use_ghost_grads": True, "mse_cls_coefficient": 2.0}
    sae = import_sae(authors(w, key, module, **values))
    f = pre_activations(w, x).relu()
    assert_computes(sae, x, f, decode(w, f))
    assert sae.config == SAEConfig(D_IN, 4, l1=8e-5, ghost=True, cls_weight=2.0)
    assert module not in sys.modules


def test_the_authors_file_at_its_real_size(authors):
    w = {"W_enc": torch.zeros(768, 49152), "b_enc": torch.zeros(49152)}
    w |= {"W_dec": torch.ones(49152, 768), "b_dec": torch.ones(768)}
    sae = import_sae(authors(w, expansion_factor=64, d_sae=49152))
    assert sae.W_enc.shape == sae.W_dec.shape == (49152, 768) and sae.config.expansion == 64


class Call:
    """Pickle as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class OddState:
    def __getstate__(self):
        return [("__class__", int)]


@pytest.mark.parametrize("where", ["cfg", "state_dict", "tensor", "saev", "prisma"])
@pytest.mark.parametrize("how", [eval, exec, open, os.system, subprocess.check_call, __import__])
def test_nothing_in_a_file_is_run(tmp_path, how, where):
    trace = tmp_path / "trace"
    python, shell = f"open({str(trace)!r}, 'w')", f"touch {trace}"
    arguments = {eval: [python], exec: [python], open: [str(trace), "w"], os.system: [shell]}
    arguments |= {subprocess.check_call: [["touch", str(trace)]], __import__: ["this"]}
    call, file = Call(how, *arguments[how]), tmp_path / "out.pt"
    sys.modules.pop("this", None)
    w = weights()
    if where == "saev":
        write_saev(file, {"d_vit": D_IN, "exp_factor": 4}, w | {"W_enc": call})
    elif where == "prisma":
        file = write_prisma(tmp_path, w | {"b_dec": call})
    else:
        content = {"cfg": {"d_in": D_IN}, "state_dict": w}
        content |= {where: call} if where in content else {"state_dict": w | {"b_enc": call}}
        torch.save(content, file)
    with pytest.raises(PatchSAEError, match=r"\.pt would call .* when loaded, so it was not"):
        import_sae(file)
    assert not trace.exists() and "this" not in sys.modules


def test_an_unknown_object_may_hold_named_values_only(tmp_path):
    torch.save({"cfg": OddState(), "state_dict": weights()}, tmp_path / "out.pt")
    with pytest.raises(PatchSAEError, match="would call test_importers.OddState"):
        import_sae(tmp_path / "out.pt")


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "topk before version 6"])
def test_saelens(tmp_path, kind, subtract):
    w, x, threshold = weights(), tokens(), torch.rand(D_SAE) * 4
    if kind == "topk before version 6":
        old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "metadata": {}}
        folder = write_saelens(
            tmp_path, w, apply_b_dec_to_input=subtract, normalize_activations=False, **old
        )
    else:
        extra = {"k": K} if kind == "topk" else {}
        per_latent = threshold if kind == "jumprelu" else None
        folder = write_saelens(
            tmp_path, w, per_latent, architecture=kind, apply_b_dec_to_input=subtract, **extra
        )
    z = pre_activations(w, x, subtract)
    f = {"standard": z.relu(), "jumprelu": z.relu() * (z > threshold)}.get(kind, top(z))
    for path in (folder, folder / "cfg.json", folder / "sae_weights.safetensors"):
        assert_computes(import_sae(path), x, f, decode(w, f))


def test_saelens_folds_a_constant_scale_of_the_activations(tmp_path):
    w, x, scale = weights(), tokens(), 0.37
    for subtract in (True, False):
        config = {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": subtract}
        folder = write_saelens(tmp_path / str(subtract), w, architecture="standard", **config)
        with pytest.raises(PatchSAEError, match="activation_scaler.json"):
            import_sae(folder)
        write_json(folder / "activation_scaler.json", {"scaling_factor": scale, "has_whitening": False})
        f = pre_activations(w, x * scale, subtract).relu()
        assert_computes(import_sae(folder), x, f, decode(w, f) / scale)


@pytest.mark.parametrize("subtract", [True, False])
def test_fold_input_takes_a_scale_and_a_mean(tmp_path, subtract):
    w, x, scale, mean = weights(), tokens(), 0.2, torch.randn(D_IN)
    sae = import_sae(write_saelens(tmp_path, w, architecture="standard", apply_b_dec_to_input=subtract))
    f = pre_activations(w, (x - mean) * scale, subtract).relu()
    assert_computes(fold_input(sae, scale, mean), x, f, decode(w, f) / scale + mean)
    with pytest.raises(PatchSAEError, match="scale=0"):
        fold_input(sae, 0)


def test_saelens_rescaling_by_decoder_norms(tmp_path):
    w, x = weights(), tokens()
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    norm = w["W_dec"].norm(dim=-1)
    f = top(pre_activations(w, x) * norm)
    assert_computes(import_sae(write_saelens(tmp_path, w, **config)), x, f, decode(w, f / norm))


def normalised(x, kind):
    """Normalise as SAELens and Prisma do; give the tokens, and what undoes it."""
    if kind == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    factor = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    return x * factor, lambda y: y / factor


@pytest.mark.parametrize("project", ["saelens", "prisma"])
@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_norms_of_each_token(tmp_path, kind, project):
    w, x = weights(), tokens()
    write = write_saelens if project == "saelens" else write_prisma
    sae = import_sae(write(tmp_path, w, architecture="standard", normalize_activations=kind))
    inside, undo = normalised(x, kind)
    f = pre_activations(w, inside).relu()
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), undo(decode(w, f)), rtol=1e-4, atol=1e-4)


def activation_header(cls, schema, size, **params):
    cfg = size | {"activation": {"cls": cls, "params": params}}
    return {"schema": schema, "cfg": cfg, "commit": "abc", "lib": "0.1"}


OLD, NEW = {"d_vit": D_IN, "exp_factor": 4}, {"d_model": D_IN, "d_sae": D_SAE}
SAEV = {
    "no schema": (OLD | {"ghost_grads": False, "sparsity_coeff": 4e-4, "seed": 1}, "relu", True),
    "1, named by cls": (
        {"schema": 1, "cls": "TopK", "cfg": OLD | {"top_k": K}},
        "topk",
        False,
    ),
    "1, named by cls, relu": ({"schema": 1, "cls": "Relu", "cfg": OLD}, "relu", False),
    "1, activation in cfg": (activation_header("TopK", 1, OLD, top_k=K), "topk", False),
    "2": (activation_header("Relu", 2, OLD), "relu", False),
    "3": (activation_header("TopK", 3, NEW, top_k=K), "topk", False),
    "4": (activation_header("Relu", 4, NEW, sparsity={"coeff": 1e-4}), "relu", False),
    "5": (activation_header("BatchTopK", 5, NEW, top_k=K, momentum=0.1), "batchtopk", False),
    "5, no threshold yet": (activation_header("BatchTopK", 5, NEW, top_k=K), "all positive", False),
}


@pytest.mark.parametrize("case", SAEV)
def test_saev(tmp_path, case):
    header, kind, subtract = SAEV[case]
    w, x, theta = weights(), tokens(), 2.5
    state = dict(w)
    if kind == "batchtopk":
        state["activation.threshold"] = torch.tensor(theta)
    if kind == "all positive":
        state["activation.threshold"] = torch.tensor(0.0)
    sae = import_sae(write_saev(tmp_path / "sae.pt", header, state))
    z = pre_activations(w, x, subtract)
    f = {"topk": top(z), "batchtopk": z.relu() * (z > theta)}.get(kind, z.relu())
    assert_computes(sae, x, f, decode(w, f))
    assert import_sae(tmp_path).config == sae.config  # a folder with this file alone
    if kind == "batchtopk":
        assert sae.config.activation is Activation.BATCHTOPK and sae.config.k == K


def test_sparsify(tmp_path):
    w, x = weights(), tokens()
    f = top(pre_activations(w, x))
    assert_computes(import_sae(write_sparsify(tmp_path / "layers.3", w)), x, f, decode(w, f))
    write_sparsify(tmp_path / "layers.4", w, num_latents=0, expansion_factor=4)
    assert import_sae(tmp_path / "layers.4").d_sae == D_SAE
    with pytest.raises(PatchSAEError, match=r"layers\.3, layers\.4"):
        import_sae(tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "n_images_2600058.pt"])
def test_prisma(tmp_path, name):
    w, x = weights(), tokens()
    z = pre_activations(w, x)
    sae = import_sae(write_prisma(tmp_path, w, name, l1_coefficient=1e-5, use_ghost_grads=True))
    assert_computes(sae, x, z.relu(), decode(w, z.relu()))
    assert sae.config.l1 == 1e-5 and sae.config.ghost
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    sae = import_sae(write_prisma(tmp_path, w, name, **topk) / name)
    assert_computes(sae, x, top(z), decode(w, top(z)))


def test_prisma_in_one_file(authors):
    w, x = weights(), tokens()
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": None}
    sae = import_sae(authors(w, module="vit_prisma.sae.config", name="VisionModelSAERunnerConfig", **topk))
    f = top(pre_activations(w, x))
    assert_computes(sae, x, f, decode(w, f))


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_dictionary_learning(tmp_path, kind):
    w, x, theta = weights(), tokens(), torch.rand(D_SAE) * 3
    z = pre_activations(w, x, kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"))
    k, one = torch.tensor(K), torch.tensor(1.5)
    state, f, norm = {
        "AutoEncoder": (linear(w, "bias"), z.relu(), 1),
        "AutoEncoderNew": (linear(w, "decoder.bias"), z.relu(), 1),
        "AutoEncoderTopK": (linear(w) | {"k": k, "threshold": torch.tensor(-1.0)}, top(z), 1),
        "BatchTopKSAE": (linear(w) | {"k": k, "threshold": one}, z.relu() * (z > one), 1),
        "MatryoshkaBatchTopKSAE": (
            w | {"k": k, "threshold": one, "group_sizes": torch.tensor([8, 40])},
            z.relu() * (z > one),
            1,
        ),
        "JumpReluAutoEncoder": (w | {"threshold": theta}, z.relu() * (z > theta), w["W_dec"].norm(dim=-1)),
    }[kind]
    sae = import_sae(write_dictionary(tmp_path, state, kind))
    assert_computes(sae, x, f * norm, decode(w, f))


def test_half_precision_weights_become_float32(tmp_path):
    w = {name: value.bfloat16() for name, value in weights().items()}
    sae = import_sae(write_saelens(tmp_path, w, architecture="standard", dtype="bfloat16"))
    assert sae.W_enc.dtype == torch.float32 and torch.equal(sae.b_enc, w["b_enc"].float())


REFUSED = {
    "saelens gated": (write_saelens, {"architecture": "gated"}),
    "saelens transcoder": (write_saelens, {"architecture": "transcoder"}),
    "saelens training": (write_saelens, {"architecture": "batchtopk"}),
    "saelens whitening": (write_saelens, {"normalize_activations": "covariance_whitening"}),
    "saelens hook_z": (write_saelens, {"reshape_activations": "hook_z"}),
    "saelens tanh": (write_saelens, {"activation_fn_str": "tanh-relu"}),
    "sparsify transcoder": (write_sparsify, {"transcode": True}),
    "sparsify skip": (write_sparsify, {"skip_connection": True}),
    "sparsify groups": (write_sparsify, {"activation": "groupmax"}),
    "sparsify signed": (write_sparsify, {"signed": True}),
    "prisma gated": (write_prisma, {"architecture": "gated"}),
    "prisma transcoder": (write_prisma, {"is_transcoder": True}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_sae_cannot_compute_is_refused(tmp_path, case):
    write, config = REFUSED[case]
    ((field, value),) = config.items()
    with pytest.raises(PatchSAEError, match=f"has {field}={value}, which .* does not compute: use"):
        import_sae(write(tmp_path, weights(), **config))


def test_gated_authors_and_unexplained_tensors_are_refused(tmp_path, authors):
    w = weights()
    with pytest.raises(PatchSAEError, match=r"out\.pt has gated_sae=True"):
        import_sae(authors(w, gated_sae=True))
    gate = {"b_gate": torch.zeros(D_SAE), "r_mag": torch.zeros(D_SAE)}
    with pytest.raises(PatchSAEError, match="also holds b_gate, r_mag"):
        import_sae(write_prisma(tmp_path / "p", w | gate))
    skip = {"W_skip": torch.eye(D_IN), "W_dec": w["W_dec"]}
    save_file(linear(w) | skip, write_sparsify(tmp_path / "s", w) / "sae.safetensors")
    with pytest.raises(PatchSAEError, match=r"also holds W_skip, decoder\.weight"):
        import_sae(tmp_path / "s")
    untrained = linear(w) | {"k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    with pytest.raises(PatchSAEError, match="no threshold yet"):
        import_sae(write_dictionary(tmp_path / "d", untrained, "BatchTopKSAE"))
    header = activation_header("BatchTopK", 2, OLD, top_k=K)
    with pytest.raises(PatchSAEError, match=r"lacks activation\.threshold"):
        import_sae(write_saev(tmp_path / "b.pt", header, w))
    header = activation_header("Relu", 6, NEW)
    with pytest.raises(PatchSAEError, match="saev schema 6"):
        import_sae(write_saev(tmp_path / "b.pt", header, w))


def test_missing_and_foreign_files_are_named(tmp_path, authors):
    def refused(path, match, source=None):
        with pytest.raises(PatchSAEError, match=match) as caught:
            import_sae(path, source)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)

    refused(tmp_path / "absent.pt", "There is no .*absent.pt: correct the path")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no SAE of a known layout")
    refused(tmp_path, "name one of its folders|holds no SAE of a known layout")
    contents = {"a.pt": b"", "b.pt": b"%PDF-1.4 text", "c.pt": b"{not json\n", "d.pt": b"{}\n??"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name} (is not a checkpoint that can be read|holds no valid JSON)")
    refused(tmp_path, "holds 4 checkpoints .* name one of the files")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "list.pt holds a list")
    torch.save(weights(), tmp_path / "plain.pt")
    refused(tmp_path / "plain.pt", "no cfg and has no config.json")
    torch.save({"state_dict": weights()}, tmp_path / "nocfg.pt")
    refused(tmp_path / "nocfg.pt", "state_dict but no cfg")
    torch.save({"cfg": {}, "state_dict": 3}, tmp_path / "nostate.pt")
    refused(tmp_path / "nostate.pt", "holds a int")
    save_file(weights(), tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "is not called sae_weights.safetensors or sae.safetensors")
    refused(authors(weights()), "has the layout of patchsae, not of saev", "saev")
    refused(tmp_path, "source='saelense' is unknown", "saelense")
    random = SAE(SAEConfig(D_IN, 2)).save(tmp_path / "ours")
    refused(random, "read it with SAE.load")


def test_damaged_files_are_named(tmp_path, authors):
    w = weights()
    file = authors(w)
    whole = file.read_bytes()
    for keep in (10, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:keep])
        with pytest.raises(PatchSAEError, match=r"out\.pt is not a checkpoint that can be read safely"):
            import_sae(file)
    folder = write_saelens(tmp_path / "lens", w, architecture="standard")
    stored = folder / "sae_weights.safetensors"
    stored.write_bytes(stored.read_bytes()[:-9])
    with pytest.raises(PatchSAEError, match="sae_weights.safetensors is damaged"):
        import_sae(folder)
    folder = write_sparsify(tmp_path / "layers.3", w)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(PatchSAEError, match="cfg.json holds a list"):
        import_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(PatchSAEError, match="There is no .*cfg.json"):
        import_sae(folder)
    scalars = {"W_dec": torch.ones(D_SAE, D_IN).long()}
    with pytest.raises(PatchSAEError, match="no dense tensor of real numbers as W_dec"):
        import_sae(authors(w | scalars))


@pytest.mark.parametrize(
    ("change", "config", "match"),
    [
        ({"W_enc": torch.zeros(D_IN, 7)}, {}, r"W_enc of shape \[12, 7\], not \[12, 48\]"),
        ({"b_dec": torch.zeros(7)}, {"d_in": D_IN, "d_sae": D_SAE}, r"b_dec of shape \[7\], not \[12\]"),
        ({"W_dec": torch.zeros(7)}, {}, r"W_dec of shape \[7\], not \[48, 12\]"),
        ({}, {"d_in": 13}, r"W_enc of shape \[12, 48\], not \[13, 48\]"),
        ({}, {"d_sae": 60}, r"W_enc of shape \[12, 48\], not \[12, 60\]"),
        ({}, {"d_sae": None, "expansion_factor": 5}, r"W_enc of shape \[12, 48\], not \[12, 60\]"),
        ({}, {"d_in": "wide"}, "d_in is wide where a number belongs"),
        ({}, {"l1_coefficient": [1, 2]}, r"l1_coefficient is \[1, 2\] where a number belongs"),
        ({}, {"l1_coefficient": -1.0}, "is damaged: l1=-1.0"),
    ],
)
def test_tensors_and_configuration_must_agree(authors, change, config, match):
    with pytest.raises(PatchSAEError, match=match):
        import_sae(authors(weights() | change, **config))


def test_missing_keys_are_named(tmp_path, authors):
    w = weights()
    with pytest.raises(PatchSAEError, match="lacks b_enc, which files of patchsae have"):
        import_sae(authors({name: value for name, value in w.items() if name != "b_enc"}))
    with pytest.raises(PatchSAEError, match="lacks the group activation_fn_kwargs"):
        import_sae(write_prisma(tmp_path / "p", w, activation_fn_str="topk", activation_fn_kwargs=None))
    with pytest.raises(PatchSAEError, match="k is missing where a number belongs"):
        import_sae(write_saelens(tmp_path / "l", w, architecture="topk"))
    with pytest.raises(PatchSAEError, match="is damaged: .* got k=49"):
        import_sae(write_saelens(tmp_path / "l", w, architecture="topk", k=49))


def trained(kind, **config) -> SAE:
    k = {"k": K} if kind in ("topk", "batchtopk") else {}
    sae = SAE(SAEConfig(D_IN, 4, activation=kind, **k, **config))
    w = weights()
    sae.load_state_dict({**sae.state_dict(), **w, "W_enc": w["W_enc"].T})
    if kind in ("batchtopk", "jumprelu"):
        sae.threshold.copy_(torch.rand(sae.threshold.shape) + 2)
    return sae


EXPORTS = [(kind, {"subtract_b_dec": flag}) for kind in Activation for flag in (True, False)]
EXPORTS += [("relu", {"input_norm": norm}) for norm in ("layer_norm", "unit_rms")]


@pytest.mark.parametrize(("kind", "config"), EXPORTS)
def test_export_to_saelens_and_back(tmp_path, kind, config):
    sae, x = trained(kind, **config), tokens()
    again = import_sae(export_saelens(sae, tmp_path / "lens"))
    assert_computes(again, x, sae.encode(x), sae(x))


@pytest.mark.parametrize(("kind", "config"), EXPORTS)
def test_saelens_itself_reads_our_export(tmp_path, kind, config):
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = trained(kind, **config), tokens()
    theirs = sae_lens.SAE.load_from_disk(export_saelens(sae, tmp_path))
    f = theirs.encode(x)
    # They undo a norm without its epsilon of 1e-5.
    tolerance = 1e-4 if "input_norm" in config else 1e-6
    torch.testing.assert_close(sae.encode(x), f, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sae(x), theirs.decode(f), rtol=tolerance, atol=tolerance)
    theirs.save_model(tmp_path / "again")
    torch.testing.assert_close(import_sae(tmp_path / "again")(x), sae(x), rtol=1e-5, atol=1e-5)


def test_check_import_sees_a_lost_topk():
    sae = trained("topk")
    x = sae.decode(sae.encode(tokens(400)))
    sae.W_enc.data = torch.linalg.pinv(sae.W_dec.detach()).T
    found = check_import(sae, x.view(20, 20, D_IN))
    f = sae.encode(x)
    assert found.l0 == pytest.approx((f > 0).sum().item() / 400) and found.l0 <= K
    unexplained = (x - sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    assert found.explained_variance == pytest.approx(1 - unexplained.item(), abs=1e-6)


def test_command_line(tmp_path, authors, capsys):
    file, out = authors(weights()), tmp_path / "converted"
    assert main(["import", str(file), str(out)]) == 0
    assert "48 latents of width 12, relu" in capsys.readouterr().out
    x = tokens()
    assert torch.equal(SAE.load(out)(x), import_sae(file)(x))
    for path in (file, tmp_path):
        assert main(["import", str(path), str(tmp_path)]) == 2
        assert "name another folder" in capsys.readouterr().err
    assert main(["export", str(out), str(tmp_path / "theirs")]) == 0
    assert torch.equal(import_sae(tmp_path / "theirs")(x), SAE.load(out)(x))
    assert main(["export", str(out), str(out)]) == 2 and "is the source" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-50])
    assert main(["import", str(file), str(tmp_path / "none"), "--layout", "patchsae"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit) as caught:
        main(["import", "--help"])
    assert caught.value.code == 0 and "--layout" in capsys.readouterr().out
    assert {str(source) for source in Project} >= {"patchsae", "saelens", "saev", "sparsify", "prisma"}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_one_number_that_is_not_finite_is_refused_by_its_name_there(tmp_path, authors, name, value):
    w = weights()
    w[name].view(-1)[5] = value
    theirs = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}.get(name, name)
    save_file(w, tmp_path / "sae_weights.safetensors")
    write_json(tmp_path / "cfg.json", {"d_in": D_IN, "d_sae": D_SAE})
    for path, tensor in (
        (tmp_path, name),
        (authors(w), name),
        (
            write_dictionary(tmp_path / "d", linear(w, "bias"), "AutoEncoder"),
            theirs.replace("b_dec", "bias"),
        ),
    ):
        with pytest.raises(PatchSAEError, match=f"has NaN or infinite values in {tensor}: fetch"):
            import_sae(path)


def test_a_number_that_float32_cannot_hold_is_refused(authors):
    w = {name: value.double() for name, value in weights().items()}
    w["b_enc"][2] = 1e300
    with pytest.raises(PatchSAEError, match="infinite values in b_enc"):
        import_sae(authors(w))


def test_a_decoder_row_of_zeros_stays_one(tmp_path):
    w = weights()
    w["W_dec"][3] = 0
    sae = import_sae(
        write_dictionary(tmp_path, w | {"threshold": torch.ones(D_SAE)}, "JumpReluAutoEncoder")
    )
    assert not sae.W_dec[3].any() and not sae.encode(tokens())[:, 3].any()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_what_wrappers_put_before_the_names_of_weights_is_removed(authors, prefix):
    plain = import_sae(authors(weights()))
    wrapped = import_sae(authors({prefix + name: value for name, value in weights().items()}))
    assert wrapped.fingerprint() == plain.fingerprint()


def test_numpy_numbers_arrays_and_paths_in_a_configuration_are_plain_values(authors):
    beside = {"curve": np.arange(6.0), "out": Path("runs/1"), "seed": np.int64(3), "best": np.float32(0.5)}
    sae = import_sae(authors(weights(), l1_coefficient=np.float64(0.25), use_ghost_grads=False, **beside))
    assert sae.config.l1 == 0.25 and type(sae.config.l1) is float
    with pytest.raises(PatchSAEError, match="l1_coefficient is .* where a number belongs"):
        import_sae(authors(weights(), l1_coefficient=np.array([0.25])))
