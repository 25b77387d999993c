"""What holds descriptors, and gives them back."""

from typing import Self


class Closing:
    """Something that `with` closes."""

    def close(self) -> None:
        """Give back what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
