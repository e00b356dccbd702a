"""The trainable modules: routers, substitutes and low-rank corrections, in float32 whatever the model's dtype."""

from students.routers.base import Router
from students.routers.channel import OPEN, ChannelRouter
from students.routers.image_token import ImageRouter
from students.routers.lora import Lora
from students.routers.substitute import Substitute
from students.routers.vocab import VocabRouter

__all__ = ["OPEN", "ChannelRouter", "ImageRouter", "Lora", "Router", "Substitute", "VocabRouter"]
