"""What toto's blocks have in common: loading, and errors that show no secret."""

from abc import ABC
from typing import ClassVar, Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, ValidationError

from toto.base.errors import InputError


class TotoBlock(Block, ABC):
    """A block of toto's."""

    model_config: ClassVar[ConfigDict] = ConfigDict(hide_input_in_errors=True)

    @classmethod
    async def saved(cls, name: str) -> Self | None:
        """The saved block of this name, None where there is none. Raises `InputError` for one that is not right."""
        try:
            return await cls.aload(name)
        except ValueError:  # what Prefect says of a block that is not there
            return None
        except RuntimeError as error:  # what it says of one that does not validate
            if not isinstance(error.__cause__, ValidationError):
                raise
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
                              for each in error.__cause__.errors(include_input=False, include_context=False,
                                                                 include_url=False))
            raise InputError(wrong, target=f"block {cls.get_block_type_slug()}/{name}",
                             hint="fix it in the UI, under Blocks") from None
