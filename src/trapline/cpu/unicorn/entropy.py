"""Where chance comes from: a seed, so that runs repeat."""

from typing import Final

_MASK64: Final = (1 << 64) - 1


class Entropy:
    """What RDRAND and RDSEED give, and how long RDTSC takes."""

    def __init__(self, seed: int) -> None:
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Let chance decide otherwise from here on."""
        self._random = seed & _MASK64
        self._noise = seed & 0x7FFFFFFF

    def draw(self) -> int:
        """Return 64 random bits, by splitmix64."""
        self._random = self._random + 0x9E3779B97F4A7C15 & _MASK64
        value = self._random
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
        return value ^ value >> 31

    def delay(self) -> int:
        """Return 0 to 31: not all reads cost the same, which is what entropy collectors feed on."""
        self._noise = self._noise * 1103515245 + 12345 & 0x7FFFFFFF
        return self._noise >> 16 & 31

    def save(self) -> tuple[int, int]:
        """Return all state."""
        return self._random, self._noise

    def load(self, saved: tuple[int, int]) -> None:
        """Return to a saved state."""
        self._random, self._noise = saved
