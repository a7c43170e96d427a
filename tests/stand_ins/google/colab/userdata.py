"Secrets that are environment variables, STAND_IN_SECRET_..."

import os


class SecretNotFoundError(Exception):
    pass


def get(name):
    "The secret of this name."
    try:
        return os.environ[f"STAND_IN_SECRET_{name}"]
    except KeyError:
        raise SecretNotFoundError(f"Secret {name} does not exist.") from None
