"""What z-lab's `dflash` and vLLM's `speculators` compute from a folder of drafters.

Runs in an environment of its own, whose packages contradict this project's, and imports nothing
of it: `python other_programs.py FOLDER` reads `jobs.json` and `features.npz`, and writes
`answers.json` and `logits.npz`. Those packages are imported inside functions, because pytest
imports this file where they are missing.

A job with a "config" makes its drafter first: random weights, in a folder that the program
itself writes.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def kind_of_zlab(job: dict):
    import dflash.model

    dflash.model._cuda_time = time.perf_counter  # there is no GPU
    kind = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel"}[job["kind"]]
    return getattr(dflash.model, kind)


def make(folder: Path, job: dict) -> None:
    """Random weights of a configuration, and of a draft vocabulary the last tokens."""
    import torch

    if job["program"] == "dflash":
        kind = kind_of_zlab(job)
        model = kind(kind.config_class.from_dict(job["config"]))
    else:
        from speculators import SpeculatorModel, SpeculatorModelConfig

        config = SpeculatorModelConfig.from_dict(job["config"])
        model = SpeculatorModel.registry[job["config"]["speculators_model_type"]](config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            gain = weight.ndim == 1  # of a norm
            weight.copy_(0.3 * torch.randn(weight.shape) + float(gain))
        buffers = dict(model.named_buffers())
        if buffers.get("d2t") is not None:
            first = len(buffers["t2d"]) - len(buffers["d2t"])
            buffers["d2t"].fill_(first)
            buffers["t2d"].copy_(torch.arange(len(buffers["t2d"])) >= first)
    model.save_pretrained(folder / job["draft"])


def generate(folder: Path, job: dict) -> dict:
    """Greedy generation by z-lab's loop: tokens, how many each round committed, and the block
    that each verified."""
    import dflash.model
    import torch
    import transformers

    draft = kind_of_zlab(job).from_pretrained(folder / job["draft"], dtype=torch.float32)
    target = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "target", dtype=torch.float32
    )
    blocks = []

    def note(module, inputs, named):
        blocks.append((named["input_ids"] if "input_ids" in named else inputs[0])[0].tolist())

    target.register_forward_pre_hook(note, with_kwargs=True)
    found = dflash.model.dflash_generate(
        draft.eval(),
        target.eval(),
        torch.tensor([job["prompt"]]),
        max_new_tokens=job["max_new_tokens"],
        stop_token_ids=None,
        return_stats=True,
    )
    new = found.output_ids[0, len(job["prompt"]) :].tolist()
    return {"tokens": new, "committed": found.acceptance_lengths, "blocks": blocks[1:]}


def no_loss(logits, targets):
    """In place of the losses, which need Triton."""
    return 0 * logits.sum(-1)


HEADS = ("lm_head", "markov_head.markov_w2", "confidence_head.proj")


def outputs(folder: Path, job: dict, arrays: dict) -> dict[str, np.ndarray]:
    """Of a speculator's LM head and other heads in its training forward, call by call."""
    import torch
    from speculators import SpeculatorModel

    model = SpeculatorModel.from_pretrained(folder / job["draft"])
    seen = {}

    def note(name, out):
        calls = sum(key.startswith(f"{name}/") for key in seen)
        seen[f"{name}/{calls}"] = out.detach()[0].numpy()

    for name in HEADS:
        with contextlib.suppress(AttributeError):  # not all drafters have all
            head = model.get_submodule(name)
            head.register_forward_hook(lambda m, inputs, out, name=name: note(name, out))
    tokens = torch.tensor([job["tokens"]])
    anchors = torch.zeros_like(tokens)
    anchors[0, job["anchors"]] = 1
    taps = torch.tensor(arrays[job["taps"]])[None]
    width = model.config.transformer_layer_config.hidden_size
    inputs = dict(
        hidden_states=taps,
        input_ids=tokens,
        document_ids=torch.zeros_like(tokens),
        loss_mask=anchors,
        verifier_last_hidden_states=taps[..., :width],
    )
    with torch.no_grad():
        options = job["options"] | {"loss_config": {"none": (no_loss, 1.0)}}
        model.eval()(**inputs, tv_loss_fn=no_loss, **options)
    return seen


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    jobs = json.loads((folder / "jobs.json").read_text())
    arrays = dict(np.load(folder / "features.npz"))
    answers, found = {}, {}
    for name, job in jobs.items():
        (folder / job["draft"]).mkdir(exist_ok=True)
        os.chdir(folder / job["draft"])  # where the path of a verifier begins
        if "config" in job:
            make(folder, job)
        if job["program"] == "dflash":
            answers[name] = generate(folder, job)
        else:
            for key, x in outputs(folder, job, arrays).items():
                found[f"{name}/{key}"] = x
    (folder / "answers.json").write_text(json.dumps(answers))
    np.savez(folder / "logits.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
