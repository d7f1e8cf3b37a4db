"""I-JEPA, ViT-g/16, ImageNet-22k, 44 epochs.

  python -m jepax.main --config=configs/ijepa_vitg16.py --config.data.path=/data/imagenet22k

TFDS lacks ImageNet-22k, so this reads a folder with CLASS/*.jpeg. Nothing of it is held out: the
run shows its loss and collapse numbers but no accuracy. --config.mesh.fsdp=8 splits parameters and
moments over 8 devices.

Not yet run. The paper gives transfer results only, of linear probes of the target encoder: 89.5 %
on CIFAR-100, 59.1 % on Places205, 55.3 % on iNaturalist 2018 (arXiv 2301.08243).
"""

from _imagenet import ijepa


def get_config(arg=""):
  return ijepa(
    arg,
    variant="giant",
    patch=16,
    predictor=dict(width=384, depth=16),
    epochs=44,
    warmup_epochs=3,
    truncation_group=16,
    context_keep=88,  # none of 100,000 groups drawn had more
    deep=True,
    data=dict(source="folder", name=None, eval_split=""),
  )
