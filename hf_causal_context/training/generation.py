"""The path that cards of class-conditional bases import `generate` and `to_image` from."""

from ..bases.images import to_image as to_image
from ..inference.sampling import generate as generate
