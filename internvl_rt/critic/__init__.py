"""Choosing among answers and learning from the choice: VisualPRM and other critics, and the MPO objective."""

from internvl_rt.critic.judge import Judge as Judge
from internvl_rt.critic.judge import Verdict as Verdict
from internvl_rt.critic.pair_file import PairRecord as PairRecord
from internvl_rt.critic.pair_file import read_pairs as read_pairs
from internvl_rt.critic.pair_file import write_pairs as write_pairs
from internvl_rt.critic.pairing import load_with_critic as load_with_critic
from internvl_rt.critic.preference import MpoLoss as MpoLoss
from internvl_rt.critic.preference import MpoWeights as MpoWeights
from internvl_rt.critic.preference import Pair as Pair
from internvl_rt.critic.preference import PairScores as PairScores
from internvl_rt.critic.preference import Shift as Shift
from internvl_rt.critic.preference import mpo_loss as mpo_loss
from internvl_rt.critic.preference import response_logprobs as response_logprobs
from internvl_rt.critic.preference import score_pairs as score_pairs
from internvl_rt.critic.rollouts import Rollout as Rollout
from internvl_rt.critic.rollouts import check_rollouts as check_rollouts
from internvl_rt.critic.rollouts import continuation_pairs as continuation_pairs
from internvl_rt.critic.rollouts import correctness_pairs as correctness_pairs
from internvl_rt.critic.visual_prm import StepScores as StepScores
from internvl_rt.critic.visual_prm import VisualPRM as VisualPRM
from internvl_rt.critic.visual_prm import split_steps as split_steps
from internvl_rt.engine.best_of import Critic as Critic
from internvl_rt.engine.best_of import Judgement as Judgement
