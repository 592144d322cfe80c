"""Your images and masks as a data set: python own_images.py IMAGES MASKS CLASSES.yaml DATASET"""

import sys

from threestage.data.ingest import IngestSettings, ingest

images, masks, classes, dataset = sys.argv[1:]
report = ingest(images, dataset, IngestSettings(format="folders", masks=masks, class_map=classes))
print(f"{report.added_images} images and {report.added_labels} masks added, {report.bad} left out")
for reject in report.rejected:
    print(f"{reject.source}: {reject.reason}")
