"""What z-lab's `dflash` and vLLM's `speculators` compute from a folder of drafters.

Runs in an environment of its own, whose packages contradict this project's, and imports nothing
of it: `python other_programs.py FOLDER` reads `jobs.json` and `features.npz`, and writes
`answers.json` and `logits.npz`. Those packages are imported inside functions, because pytest
imports this file where they are missing.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def generate(folder: Path, job: dict) -> dict:
    """Greedy generation by z-lab's loop: tokens, and how many each round committed."""
    import dflash.model
    import torch
    import transformers

    dflash.model._cuda_time = time.perf_counter  # there is no GPU
    kind = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel"}[job["kind"]]
    load = getattr(dflash.model, kind).from_pretrained
    draft = load(folder / job["draft"], dtype=torch.float32)
    target = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "target", dtype=torch.float32
    )
    found = dflash.model.dflash_generate(
        draft.eval(),
        target.eval(),
        torch.tensor([job["prompt"]]),
        max_new_tokens=job["max_new_tokens"],
        stop_token_ids=None,
        return_stats=True,
    )
    new = found.output_ids[0, len(job["prompt"]) :]
    return {"tokens": new.tolist(), "committed": found.acceptance_lengths}


def no_loss(logits, targets):
    """In place of the losses, which need Triton."""
    return 0 * logits.sum(-1)


def logits(folder: Path, job: dict, arrays: dict) -> list[np.ndarray]:
    """Logits of every call of a speculator's LM head in its training forward."""
    import torch
    from speculators import SpeculatorModel

    os.chdir(folder / job["draft"])  # where the path of its verifier begins
    model = SpeculatorModel.from_pretrained(folder / job["draft"])
    seen = []
    model.lm_head.register_forward_hook(lambda m, inputs, out: seen.append(out.detach()))
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
    return [x[0].numpy() for x in seen]


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    jobs = json.loads((folder / "jobs.json").read_text())
    arrays = dict(np.load(folder / "features.npz"))
    answers, found = {}, {}
    for name, job in jobs.items():
        if job["program"] == "dflash":
            answers[name] = generate(folder, job)
        else:
            for i, x in enumerate(logits(folder, job, arrays)):
                found[f"{name}/{i}"] = x
    (folder / "answers.json").write_text(json.dumps(answers))
    np.savez(folder / "logits.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
