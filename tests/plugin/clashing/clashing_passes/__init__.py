from typing import ClassVar


class Inject:
    name: ClassVar[str] = "inject"

    def apply(self, subject):
        raise AssertionError("never run")
