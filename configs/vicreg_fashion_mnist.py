"""VICReg on the embedded Fashion-MNIST subset, with the encoder and the probes of the quick start.

python -m jepax.main --config=configs/vicreg_fashion_mnist.py

16 TFLOP of training, against the quick start's 14. Not yet run to its end: `benchmarks/study.py`
compares the methods at equal compute.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(arg, name="vicreg", expander=(256, 256, 256))
