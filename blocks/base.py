"""The base of toto's blocks: loads them, and reports errors without secrets."""

from abc import ABC
from typing import ClassVar, Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, ValidationError

from toto.base.errors import InputError


class TotoBlock(Block, ABC):
    """The base class of toto's blocks."""

    model_config: ClassVar[ConfigDict] = ConfigDict(hide_input_in_errors=True)

    @classmethod
    async def saved(cls, name: str) -> Self | None:
        """The saved block of this name; None when there is none. Raises `InputError` when its values are wrong."""
        try:
            return await cls.aload(name)
        except ValueError:  # Prefect raises it for a block that does not exist
            return None
        except RuntimeError as error:  # Prefect raises it for a block that does not validate
            if not isinstance(error.__cause__, ValidationError):
                raise
            wrong = "; ".join(
                f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
                for each in error.__cause__.errors(include_input=False, include_context=False, include_url=False)
            )
            raise InputError(
                wrong, target=f"block {cls.get_block_type_slug()}/{name}", hint="fix it in the UI, under Blocks"
            ) from None
