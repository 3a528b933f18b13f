"""Choosing among answers and learning from the choice: VisualPRM and other critics, and the MPO objective."""

from internvl_rt.critic.judge import Judge as Judge
from internvl_rt.critic.judge import Verdict as Verdict
from internvl_rt.critic.pairing import load_with_critic as load_with_critic
from internvl_rt.critic.visual_prm import StepScores as StepScores
from internvl_rt.critic.visual_prm import VisualPRM as VisualPRM
from internvl_rt.critic.visual_prm import split_steps as split_steps
