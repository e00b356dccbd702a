"""The trainable modules: routers, substitutes and low-rank corrections, in float32 whatever the model's dtype."""

from students.routers.base import ImageRouter, Router
from students.routers.channel import OPEN, ChannelRouter
from students.routers.low_rank import Lora, Substitute
from students.routers.vocab import VocabRouter

__all__ = ["OPEN", "ChannelRouter", "ImageRouter", "Lora", "Router", "Substitute", "VocabRouter"]
