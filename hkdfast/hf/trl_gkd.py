"""GKDTrainer by itself: TRL warns of what is experimental when it is imported."""

from trl.experimental import gkd

from .trl_trainers import Applied


class GKDTrainer(Applied, gkd.GKDTrainer):
    """`trl.experimental.gkd.GKDTrainer` with hkdfast's loss, which also takes vocabularies of different sizes.

    Its arguments beside TRL's are those of `hkdfast.hf.DistillationTrainer`.
    """
