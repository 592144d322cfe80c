"""The champion of a registered model: which version earns the alias, who waits for a person, and the way back.

Tags of the registered model remember its earlier champions, and whether its project asks for a person's approval.
"""

import getpass
import json
from typing import Any

from threestage.errors import InputError
from threestage.run_folder.lineage import AT_SIZE

CHAMPION, CANDIDATE = "champion", "candidate"
DECISION = "threestage.champion"
EARLIER, APPROVAL = "threestage.earlier_champions", "threestage.approval"  # tags of the registered model
REQUIRED = "required"
MOST_EARLIER = 100
MEAN_IOU, VALIDATION, DRIFT = "mean_iou", "threestage.validation_digest", "threestage.validation_drift"


class Promotion:
    """The alias of one registered model, moved through MLflow's client."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name
        self._model = client.get_registered_model(name)

    def holder(self, alias: str = CHAMPION) -> Any:
        """The version with an alias, or None."""
        number = self._model.aliases.get(alias)
        return None if number is None else self._client.get_model_version(self._name, str(number))

    def require_approval(self) -> None:
        """From now on, whoever registers: the champion changes only when a person approves it."""
        self._client.set_registered_model_tag(self._name, APPROVAL, REQUIRED)

    def needs_approval(self) -> bool:
        return bool(self._model.tags.get(APPROVAL) == REQUIRED)

    def consider(self, version: Any, approve: bool, max_drift: float | None = None) -> str:
        """Make a version the champion where it has earned it or, where a person approves, the candidate. `approve`: the
        run asks for approval; `max_drift`: see `decide`. Returns the decision in words, which is also a tag of the version."""
        if approve:
            self.require_approval()
        takes, decision = decide(version, self.holder(), max_drift)
        if takes and (approve or self.needs_approval()):
            decision = self._wait(version, decision)
        elif takes:
            self._give(version)
        self._client.set_model_version_tag(self._name, version.version, DECISION, decision)
        return decision

    def _wait(self, version: Any, decision: str) -> str:
        waiting = self.holder(CANDIDATE)
        if waiting is not None and int(waiting.version) != int(version.version) and _is_no_worse(waiting, version):
            return f"not the {CANDIDATE}: version {waiting.version} waits for approval and has {score_of(waiting):.4f}"
        self._client.set_registered_model_alias(self._name, CANDIDATE, version.version)
        return (
            f"waits for approval to be {decision}; `threestage models promote models:/{self._name}@{CANDIDATE} --approve` "
            "makes it the champion"
        )

    def promote(self, version: Any, approved: bool) -> Any:
        """Make a version the champion, whatever it scores. Returns the champion before, or None. Raises InputError where the
        project asks for approval and there is none."""
        if self.needs_approval() and not approved:
            raise InputError(
                f"models:/{self._name}/{version.version}: in this project a person approves each champion; add --approve",
                "models/needs-approval",
            )
        before = self.holder()
        self._give(version)
        if self._model.aliases.get(CANDIDATE) in (version.version, str(version.version)):
            self._client.delete_registered_model_alias(self._name, CANDIDATE)
        decision = f"the champion: approved by {_user()}" if approved else "the champion: promoted by hand"
        self._client.set_model_version_tag(self._name, version.version, DECISION, decision)
        return before

    def roll_back(self) -> tuple[Any, Any]:
        """Give the alias back to the champion before this one. Returns it, and this one. Raises InputError where none is known;
        versions that were deleted are passed over."""
        champion, earlier, back = self.holder(), self._earlier(), None
        while champion is not None and earlier and back is None:
            if (number := earlier.pop()) != int(champion.version):
                back = self._existing(number)
        if back is None:
            raise InputError(
                f"models:/{self._name}: no earlier champion is recorded; name a version with `threestage models promote`",
                "models/no-earlier-champion",
            )
        self._client.set_registered_model_alias(self._name, CHAMPION, back.version)
        self._client.set_registered_model_tag(self._name, EARLIER, json.dumps(earlier))
        decision = f"the champion again: rolled back from version {champion.version} by {_user()}"
        self._client.set_model_version_tag(self._name, back.version, DECISION, decision)
        return back, champion

    def _give(self, version: Any) -> None:
        """The alias, after its holder is remembered: a call that is cut between the two loses nothing."""
        holder = self.holder()
        if holder is not None and int(holder.version) != int(version.version):
            earlier = [*self._earlier(), int(holder.version)][-MOST_EARLIER:]
            self._client.set_registered_model_tag(self._name, EARLIER, json.dumps(earlier))
        self._client.set_registered_model_alias(self._name, CHAMPION, version.version)

    def _earlier(self) -> list[int]:
        """Numbers of the champions before this one, the last one last."""
        try:
            found = json.loads(self._model.tags.get(EARLIER, "[]"))
        except ValueError:
            return []
        return [number for number in found if isinstance(number, int)] if isinstance(found, list) else []

    def _existing(self, number: int) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version(self._name, str(number))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "an unnamed user"


def score_of(version: Any) -> float | None:
    """Its mean IoU, where it was measured."""
    return float(version.tags[MEAN_IOU]) if MEAN_IOU in version.tags else None


def _scored_on(version: Any) -> tuple[str | None, str]:
    """Digest of images and masks, and the size at which they were scored; a data set's name says nothing."""
    return version.tags.get(VALIDATION), version.tags.get("validation", "").partition(AT_SIZE)[2]


def _is_no_worse(version: Any, than: Any) -> bool:
    mine, theirs = score_of(version), score_of(than)
    return mine is not None and theirs is not None and mine >= theirs and _scored_on(version) == _scored_on(than)


def decide(version: Any, champion: Any, max_drift: float | None = None) -> tuple[bool, str]:
    """Whether a new version takes the champion's place, and why: only where both were scored on the same images, which are not
    further than `max_drift` from its training images. What is not known of an older version does not count."""
    score, where = score_of(version), version.tags.get("validation")
    if score is None:
        return False, "not the champion: it has no mean IoU"
    if champion is not None and int(champion.version) == int(version.version):
        return False, f"the champion, with mean IoU {score:.4f} on {where}"
    if max_drift is not None and (drift := float(version.tags.get(DRIFT, max_drift))) > max_drift:
        return False, (
            f"not the champion: its validation images drift {drift:.2f} from its training images, more than "
            f"registry.max_drift={max_drift:g}; `threestage models promote models:/{version.name}/{version.version}` makes it "
            "the champion"
        )
    if champion is None:
        return True, f"the champion: the first, with mean IoU {score:.4f} on {where}"
    other, number = score_of(champion), champion.version
    if other is None or _scored_on(champion) != _scored_on(version):
        there = champion.tags.get("validation") or "nothing known"
        return False, (
            f"not compared: the champion, version {number}, was scored on {there}, this one on {where} with other images; "
            f"`threestage models promote models:/{version.name}/{version.version}` makes it the champion"
        )
    if score > other:
        return True, f"the champion: mean IoU {score:.4f}, version {number} has {other:.4f} on {where}"
    return False, f"not the champion: mean IoU {score:.4f}, version {number} has {other:.4f} on {where}"
