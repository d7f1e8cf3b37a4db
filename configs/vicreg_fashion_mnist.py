"""VICReg on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/vicreg_fashion_mnist.py

Not yet run to its end. After 2 TFLOP, three seeds on two cores (`benchmarks/results/compare.md`):
74.5 % k-NN and 78.5 % linear; the same encoder at random initialisation 63.9 % and 71.7 %.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(arg, name="vicreg", expander=(256, 256, 256))
