"""I-JEPA with VICReg's variance and covariance on the context's tokens, after C-JEPA.

python -m jepax.main --config=configs/cjepa_fashion_mnist.py

ijepa_fashion_mnist.py and one more term: features that are spread and uncorrelated over the tokens
of a batch serve k-NN better than features that only predict one another. Source of the idea: arXiv
2410.19560, which regularises the mean of a sample's tokens; here it is all tokens. Chosen on 5,000
held-out images of the training split, 4 TFLOP, one seed, target's k-NN: tokens 79.1 %, mean of the
tokens 77.4 %, no regulariser 75.3 %. After 36 TFLOP on all 60,000 images, three seeds: k-NN 85.5 %
and linear 85.6 % on the test set, where raw pixels have 84.6 % and 83.4 % (docs/study.md).
"""

from ijepa_fashion_mnist import get_config as ijepa


def get_config(arg=""):
  c = ijepa(arg)
  c.method.regulariser = dict(name="vicreg", weight=0.001, on="tokens")
  return c
