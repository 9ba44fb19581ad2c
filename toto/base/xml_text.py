"""Text for XML documents, whatever it came from."""

import re
from typing import Final

_ILLEGAL: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str) -> str:
    """Text with a replacement for each character that no XML document may hold."""
    return _ILLEGAL.sub("�", text)
