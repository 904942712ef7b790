"""Approval by the policy of a recipe: by whom, and whether the keys will do, before anything is trained."""

from __future__ import annotations

from contract.errors import ConfigurationError
from lake.approval import Approver
from lake.errors import CorruptLakeError
from lake.trust.keys import ONLINE, TARGETS, KeyFolder
from lake.trust.repository import TrustRepository
from trainer.steps import StepContext

WHO = "headwater train"
_ROLE_OF = {TARGETS: "targets", ONLINE: "timestamp"}
"""The role in the lake's metadata of each key."""


def approver_of(context: StepContext) -> Approver | None:
    """Who approves by the policy of the recipe; None where it lets nobody, or no keys were given.

    Nothing is written. A key that the lake does not know, or that cannot be read, would be found out only after hours
    of training, and leave a draft that nobody asked for.

    Raises:
        ConfigurationError: the keys cannot approve; naming folder, reason and remedy.
        StoreUnavailableError: the store did not answer.
    """
    if not context.recipe.policy.approve or context.keys is None:
        return None
    folder = KeyFolder(context.keys, context.passphrase)
    try:
        targets, online, anchor = folder.read(TARGETS), folder.read_if_any(ONLINE), folder.anchor()
        if anchor is None:
            raise ConfigurationError(
                "root.json is not beside them; copy it there from where `headwater keys init` wrote it"
            )
        trust = TrustRepository(context.store, anchor=anchor)
        root = trust.published().root
        for name, key in ((TARGETS, targets), (ONLINE, online)):
            if key is not None and key.public_key.keyid not in root.roles[_ROLE_OF[name]].keyids:
                raise ConfigurationError(
                    f"{folder.file(name)} is not the key that the lake names in root version {root.version}; bring "
                    "that one, or put this one into force with: headwater keys rotate"
                )
    except (ConfigurationError, CorruptLakeError) as error:
        raise ConfigurationError(
            f"[policy] approve = true, and the keys in {context.keys} cannot approve: {error}. Without --keys the "
            "release stays a draft for a person to approve"
        ) from error
    return Approver(trust=trust, targets=targets, online=online, who=WHO)
