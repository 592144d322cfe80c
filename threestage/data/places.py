"""What a folder or prefix holds: a data set of ours, or images."""

from threestage.data import storage
from threestage.data.listing import first_image
from threestage.data.records import MANIFEST_NAME, load_manifest
from threestage.errors import InputError


def holds_data_set(folder: str) -> bool:
    """Whether `folder` is a data set. A manifest.json of somebody else's beside images is no reason to say so.

    Raises InputError where a manifest cannot be read and there is no image.
    """
    if not storage.is_file(storage.join(folder, MANIFEST_NAME)):
        return False
    try:
        load_manifest(folder)
    except InputError:
        if not first_image(folder):
            raise
        return False
    return True
