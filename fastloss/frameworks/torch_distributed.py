"""The former place of `Ranks`, by which pickles name it."""

from fastloss.frameworks.torch.distributed import Ranks as Ranks
