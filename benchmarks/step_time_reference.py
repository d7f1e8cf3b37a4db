"""One side of step_time.py: the reference I-JEPA's training step, timed in a process of its own.

Needs torch and a checkout of facebookresearch/ijepa, and nothing of jepax or JAX. Reads a JSON of
settings (see `step_time.Case`) on the command line; waits for its turns (`step_time.Turns`); prints
JSON as its last line.

The step is that of the reference's train.py: target, context, prediction, smooth L1, backward,
AdamW over its four parameter groups, EMA. What it does beside one device's arithmetic is left out:
loggers, DistributedDataParallel, the copy of the batch to the device.
"""

from __future__ import annotations

import copy
import functools
import json
import resource
import sys
import time
import types

import torch
import torch.nn.functional as F


def build(case: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
  """Encoder and predictor of the reference's classes, in the case's sizes."""
  for name, function in (("imagenet1k", "make_imagenet1k"), ("transforms", "make_transforms")):
    name = f"src.datasets.{name}" if name == "imagenet1k" else f"src.{name}"
    sys.modules[name] = types.ModuleType(name)  # these two need torchvision, and aren't timed
    setattr(sys.modules[name], function, None)
  from src.models import vision_transformer as vit

  model, predictor = case["encoder"], case["predictor"]
  encoder = vit.VisionTransformer(
    img_size=[case["size"]],
    patch_size=model["patch"],
    in_chans=case["channels"],
    embed_dim=model["width"],
    depth=model["depth"],
    num_heads=model["heads"],
    mlp_ratio=model["mlp_width"] / model["width"],
    qkv_bias=True,
    norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
  )
  return encoder, vit.vit_predictor(
    num_patches=encoder.patch_embed.num_patches,
    embed_dim=model["width"],
    predictor_embed_dim=predictor["width"],
    depth=predictor["depth"],
    num_heads=predictor["heads"],
  )


def parameter_groups(*modules: torch.nn.Module) -> list[dict]:
  """Matrices decay, biases and norms do not, as in the reference's init_opt."""
  named = [(name, p) for m in modules for name, p in m.named_parameters() if p.requires_grad]
  plain = [p for name, p in named if "bias" in name or p.ndim == 1]
  matrices = [p for name, p in named if not ("bias" in name or p.ndim == 1)]
  return [{"params": matrices, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def make_step(case: dict, device: str):
  """A function without arguments that trains one step and returns the loss."""
  from src.masks.utils import apply_masks
  from src.utils.tensors import repeat_interleave_batch

  torch.manual_seed(0)
  encoder, predictor = (m.to(device) for m in build(case))
  target = copy.deepcopy(encoder)
  for p in target.parameters():
    p.requires_grad = False
  optimizer = torch.optim.AdamW(parameter_groups(encoder, predictor), lr=1e-4)
  run = [encoder, predictor, target]
  if case["compile"]:
    run = [torch.compile(m) for m in run]
  run_encoder, run_predictor, run_target = run
  b, n = case["batch"], encoder.patch_embed.num_patches
  images = torch.randn(b, case["channels"], case["size"], case["size"], device=device)
  order = torch.stack([torch.randperm(n) for _ in range(b)]).to(device)
  context = [order[:, : case["context"]].sort(1).values]
  targets = [
    torch.stack([torch.randperm(n)[: case["target"]] for _ in range(b)]).to(device)
    for _ in range(case["targets"])
  ]
  half = case["precision"] == "bfloat16"
  scaler = torch.amp.GradScaler(device) if half and device == "cuda" else None

  def step() -> torch.Tensor:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
      with torch.no_grad():
        h = run_target(images)
        h = apply_masks(F.layer_norm(h, (h.size(-1),)), targets)
        h = repeat_interleave_batch(h, b, repeat=len(context))
      loss = F.smooth_l1_loss(run_predictor(run_encoder(images, context), context, targets), h)
    if scaler is None:
      loss.backward()
      optimizer.step()
    else:  # the reference scales bfloat16 losses too
      scaler.scale(loss).backward()
      scaler.step(optimizer)
      scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
      for p, q in zip(encoder.parameters(), target.parameters(), strict=True):
        q.data.mul_(0.998).add_((1.0 - 0.998) * p.detach().data)
    return loss.detach()

  return step


def main() -> None:
  case = json.loads(sys.argv[1])
  sys.path.insert(0, case["reference"])
  device = "cuda" if torch.cuda.is_available() else "cpu"
  step = make_step(case, device)
  start = time.perf_counter()
  float(step())
  first = time.perf_counter() - start
  for _ in range(case["warmup"]):
    float(step())
  seconds, end = [], 0.0
  for _ in range(case["steps"]):
    if time.perf_counter() >= end:
      print("ready", flush=True)
      sys.stdin.readline()
      end = time.perf_counter() + 0.5
    start = time.perf_counter()
    float(step())
    if device == "cuda":
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
  if device == "cuda":
    peak = torch.cuda.max_memory_allocated()
  else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  name = (
    torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
  )
  print(
    json.dumps(
      {
        "seconds": seconds,
        "first_step": first,
        "peak_bytes": peak,
        "device": name,
        "version": f"torch {torch.__version__}",
      }
    )
  )


if __name__ == "__main__":
  main()
