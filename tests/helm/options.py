"""Combinations of values that people have, each as KEY=JSON: every branch of every template."""

from pathlib import Path

from tests.helm.chart import VALUES_FILES

OPTIONS: dict[str, tuple[str, ...]] = {
    "tls from a secret": (
        "tls.enabled=true",
        'tls.secretName="certs"',
        'redis.url="rediss://cache.example:6380"',
    ),
    "tls from cert-manager, clients too": (
        "tls.enabled=true",
        "tls.requireClientCertificate=true",
        "redis.coldTier=false",
        "tls.certManager.enabled=true",
        'tls.certManager.issuerRef.name="ca"',
        'tls.certManager.dnsNames=["model1.example"]',
    ),
    "tls of ray": ("tls.ray=true",),
    "tokens": ("auth.tokens.enabled=true",),
    "tokens and tls": (
        "auth.tokens.enabled=true",
        'auth.tokens.secretName="clients"',
        "tls.enabled=true",
        "redis.coldTier=false",
        'tls.secretName="certs"',
    ),
    "every secret brought along": ('auth.secretName="mine"', 'redis.passwordSecret.name="cache"'),
    "a redis of one's own": ('redis.url="redis://cache.example:6379"',),
    "a redis over tls": (
        'redis.url="rediss://cache.example:6380"',
        'redis.passwordSecret={"name": "cache", "key": "password"}',
        'redis.caSecret={"name": "cache-ca", "key": "ca.crt"}',
    ),
    "no redis at all": ("redis.gcsFaultTolerance=false", "redis.coldTier=false"),
    "redis for ray alone": ("redis.coldTier=false", "redis.valkey.persistence.enabled=false"),
    "a model from a claim": (
        'model.source="pvc"',
        'model.pvc.claimName="models"',
        'model.subPath="v4"',
    ),
    "a model from an image": ('model.source="image"', 'model.image.reference="models/v4:1"'),
    "a model from an object store": (
        'model.source="objectStore"',
        'model.objectStore.args=["copy", "store:models/v4", "/models"]',
        'model.objectStore.env=[{"name": "RCLONE_TRANSFERS", "value": "8"}]',
        'model.objectStore.secretName="store"',
    ),
    "a model kept on the nodes": (
        'model.source="objectStore"',
        'model.objectStore.args=["copy", "store:models/v4", "/models"]',
        'model.objectStore.cachePath="/mnt/models"',
    ),
    "a model in the image": ('model.source="path"', 'model.path="/opt/v4"'),
    "kv on nvme": ('kv.disk.type="hostPath"', 'kv.disk.path="/mnt/nvme/model1"'),
    "kv on claims": (
        'kv.disk.type="ephemeral"',
        'kv.disk.size="1Ti"',
        'kv.disk.storageClassName="local"',
        "settings.kv.diskBytes=1000000000000",
    ),
    "kv in an emptyDir, no store elsewhere": ('kv.disk.type="emptyDir"', "redis.coldTier=false"),
    "gpus on chosen nodes": (
        "attention.group.gpus=8",
        "experts.group.gpus=4",
        'experts.group.nodeSelector={"accelerator": "h100"}',
        'experts.group.tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]',
        'experts.group.affinity={"podAffinity": {}}',
        'experts.group.priorityClassName="serving"',
        'attention.group.podLabels={"team": "inference"}',
        'attention.group.podAnnotations={"example.com/note": "x"}',
        "attention.group.terminationGracePeriodSeconds=600",
        'settings.model.device="cuda"',
        'settings.model.dtype="bfloat16"',
    ),
    "scaling by itself": (
        "settings.autoscale.enabled=true",
        "settings.autoscale.experts.busyShare=0.5",
        "attention.group.max=8",
    ),
    "no autoscaler, no second cluster": (
        "autoscaler.enabled=false",
        'upgrade.strategy="None"',
        "attention.group.minAvailable=0",
        "experts.group.minAvailable=0",
    ),
    "monitoring": (
        "monitoring.serviceMonitor.enabled=true",
        'monitoring.serviceMonitor.labels={"release": "prometheus"}',
        "monitoring.dashboards.enabled=true",
    ),
    "open to the world": (
        'services.grpc={"type": "LoadBalancer", "annotations": {"example.com/internal": "true"}}',
        'services.http.type="NodePort"',
        "networkPolicy.enabled=false",
        "attention.group.topologySpread=[]",
        'image.repository="registry.example/model1"',
        'image.pullSecrets=[{"name": "pull"}]',
        f'image.digest="sha256:{"0" * 64}"',
        'serviceAccount.annotations={"example.com/identity": "model1"}',
        'extraEnv=[{"name": "NO_PROXY", "value": "*"}]',
        'fullnameOverride="inference"',
    ),
}

# Everything that tests render: options and values files, by name.
CASES: dict[str, tuple[tuple[str, ...], tuple[Path, ...]]] = {
    "the chart's own values": ((), ()),
    **{file.stem: ((), (file,)) for file in VALUES_FILES},
    **{name: (sets, ()) for name, sets in OPTIONS.items()},
}
