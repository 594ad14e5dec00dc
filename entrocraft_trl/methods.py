"""The methods by name, for the command line and for comparisons: trainer and config, a line each."""

from trl import GRPOConfig, GRPOTrainer

from .baselines.aent import AEntConfig, AEntTrainer
from .baselines.base import BaselineConfig, BaselineTrainer
from .baselines.clip_b import ClipBConfig, ClipBTrainer
from .baselines.clip_cov import ClipCovConfig, ClipCovTrainer
from .baselines.clip_v import ClipVConfig, ClipVTrainer
from .baselines.dcpo import DCPOConfig, DCPOTrainer
from .baselines.entropic import EntroPICConfig, EntroPICTrainer
from .baselines.entropic_sequence import EntroPICSequenceConfig, EntroPICSequenceTrainer
from .baselines.kl_cov import KLCovConfig, KLCovTrainer
from .baselines.raft import RAFTPlusPlusConfig, RAFTPlusPlusTrainer
from .baselines.reinforce import NSRConfig, NSRTrainer, PSRConfig, PSRTrainer, WReinforceConfig, WReinforceTrainer
from .baselines.repo_r import REPORConfig, REPORTrainer
from .baselines.stare import STAREConfig, STARETrainer
from .baselines.steer import STEERConfig, STEERTrainer
from .config import EntrocraftGRPOConfig
from .trainer import EntrocraftGRPOTrainer


METHODS: dict[str, tuple[type[GRPOTrainer], type[GRPOConfig]]] = {
    "entrocraft": (EntrocraftGRPOTrainer, EntrocraftGRPOConfig),
    "grpo": (BaselineTrainer, BaselineConfig),
    "clip_cov": (ClipCovTrainer, ClipCovConfig),
    "kl_cov": (KLCovTrainer, KLCovConfig),
    "psr": (PSRTrainer, PSRConfig),
    "nsr": (NSRTrainer, NSRConfig),
    "w_reinforce": (WReinforceTrainer, WReinforceConfig),
    "raft_plus_plus": (RAFTPlusPlusTrainer, RAFTPlusPlusConfig),
    "aent": (AEntTrainer, AEntConfig),
    "entropic": (EntroPICTrainer, EntroPICConfig),
    "entropic_sequence": (EntroPICSequenceTrainer, EntroPICSequenceConfig),
    "steer": (STEERTrainer, STEERConfig),
    "clip_b": (ClipBTrainer, ClipBConfig),
    "clip_v": (ClipVTrainer, ClipVConfig),
    "repo_r": (REPORTrainer, REPORConfig),
    "stare": (STARETrainer, STAREConfig),
    "dcpo": (DCPOTrainer, DCPOConfig),
}
