"""VICReg on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/vicreg_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 77.6 % k-NN and 81.2 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(arg, name="vicreg", expander=(256, 256, 256))
