"""SimCLR on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/simclr_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 77.3 % k-NN and 81.5 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %. Source of the method: arXiv 2002.05709; there is no
published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  # The temperature is the paper's best for small images (0.5 on CIFAR-10); ImageNet's is 0.1.
  return fashion_mnist(arg, name="simclr", projector=(256, 128), temperature=0.5)
