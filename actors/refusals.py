"""What the registry refuses, as exceptions that whoever asks can read without loading what the registry needs."""


class RegistryConflict(Exception):
    """The change does not fit the state that holds; the message names that."""

    status = 409


class UnknownVersion(Exception):
    """No such version of the model's speculator is known."""

    status = 404
