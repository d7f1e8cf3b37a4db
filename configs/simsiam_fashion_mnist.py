"""SimSiam on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/simsiam_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 76.3 % k-NN and 80.1 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %. Source of the method: arXiv 2011.10566; there is no
published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  c = fashion_mnist(arg, name="simsiam", projector=(256, 256, 256), predictor=64)
  c.optim.unscheduled = "predictor"
  return c
