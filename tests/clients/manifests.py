"""Checks the manifests of a deployment pack against Kubernetes' schemas, and writes the configurations in it to a folder.

manifests.py PACK FOLDER
"""

import json
import pathlib
import sys

import kubernetes_validate
import yaml

VERSION = "1.37"
pack, folder = map(pathlib.Path, sys.argv[1:])

checked = 0
for path in sorted(pack.glob("kubernetes/*.yaml")):
    for manifest in yaml.safe_load_all(path.read_text()):
        # Kustomize's own file and the Prometheus operator's type have no schema there.
        if manifest["kind"] in ("Kustomization", "ServiceMonitor"):
            continue
        kubernetes_validate.validate(manifest, VERSION, strict=True)
        checked += 1
        if manifest["kind"] == "ConfigMap":
            (folder / "kubernetes.yaml").write_text(manifest["data"]["tollgate.yaml"])
assert checked >= 8, checked

values = yaml.safe_load((pack / "helm/tollgate/values.yaml").read_text())
(folder / "helm.yaml").write_text(values["config"])
(folder / "compose.yaml").write_text((pack / "compose/tollgate.yaml").read_text())

for name in ("docker-compose.yml", "filebeat/filebeat.yml", "helm/tollgate/Chart.yaml"):
    assert yaml.safe_load((pack / name).read_text()), name
for path in pack.glob("grafana/provisioning/**/*.yml"):
    assert yaml.safe_load(path.read_text()), path
json.loads((pack / "helm/tollgate/values.schema.json").read_text())
