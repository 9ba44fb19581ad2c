"""The base class of all of toto's errors.

An error says what failed, on which target, and what to do next. Errors in the operator's input (manifest, test script,
nix evaluation) are shown without a traceback.
"""


class TotoError(Exception):
    """An error that the operator has to know about.

    `target` names what it is about (a host, a file); `hint` is the next step to take.
    """

    def __init__(self, message: str, *, target: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.target = target
        self.hint = hint

    def __str__(self) -> str:
        text = self.message if self.target is None else f"{self.target}: {self.message}"
        return text if self.hint is None else f"{text}\nnext: {self.hint}"

    def __repr__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect pickles exceptions, and those with keyword arguments do not unpickle without help.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[TotoError], args: tuple[object, ...], state: dict[str, object]) -> TotoError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InputError(TotoError):
    """The operator's input is wrong: a manifest, settings, a name, a test script."""
