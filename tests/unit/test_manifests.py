"""The manifests of docs/kubernetes.md: valid for Kubernetes, and what one names is there.

No cluster is asked: none was there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "script" / "manifests"
VARIANTS = {
    "plain": [],
    "all": [
        "--set=tls=true", "--set=guest_network=true", "--set=slots=40", "--set=gateways=1",
        "--set=kvm_resource=devices.kubevirt.io/kvm", "--set=namespace=elsewhere",
    ],
}  # fmt: skip
MADE_BY_HAND = {"vmkernel-ray-ca"}


def run(*options: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module", params=VARIANTS)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    options = VARIANTS[request.param]
    return [
        *yaml.safe_load_all(run("--secrets", *options)),
        *yaml.safe_load_all(run(*options)),
    ]


def of(manifests: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [one for one in manifests if one["kind"] in kinds]


def workloads(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name: the pods' templates."""
    found = of(manifests, "Deployment", "DaemonSet")
    return {one["metadata"]["name"]: one["spec"]["template"] for one in found}


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    spec = template["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def chosen(selector: dict[str, str], manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        template
        for template in workloads(manifests).values()
        if selector.items() <= template["metadata"]["labels"].items()
    ]


@pytest.mark.parametrize("version", ["1.33", "1.36"])
def test_kubernetes_takes_them_strictly(manifests, version):
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_is_wrong_is_found(manifests):
    [host] = of(manifests, "DaemonSet")
    wrong = json.loads(json.dumps(host))
    wrong["spec"]["template"]["spec"]["hostUser"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_no_name_twice_and_all_in_one_namespace(manifests):
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(set(names)) == len(names)
    [namespace] = of(manifests, "Namespace")
    for one in manifests:
        if one is not namespace:
            assert one["metadata"]["namespace"] == namespace["metadata"]["name"]
    assert "${" not in yaml.safe_dump_all(manifests)


def test_secrets_and_config_maps_that_are_named_are_there(manifests):
    there = {one["metadata"]["name"]: one for one in of(manifests, "Secret", "ConfigMap")}
    for template in workloads(manifests).values():
        for volume in template["spec"]["volumes"]:
            if "secret" in volume and (name := volume["secret"]["secretName"]) not in MADE_BY_HAND:
                assert there[name]["kind"] == "Secret"
            if "configMap" in volume:
                assert there[volume["configMap"]["name"]]["kind"] == "ConfigMap"
        for container in containers(template):
            for variable in container.get("env", ()):
                if key := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert key["key"] in there[key["name"]]["stringData"]


def test_mounts_have_volumes_and_volumes_are_mounted(manifests):
    for template in workloads(manifests).values():
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounted = [m for one in containers(template) for m in one["volumeMounts"]]
        assert {mount["name"] for mount in mounted} == volumes
        for one in containers(template):
            places = [mount["mountPath"] for mount in one["volumeMounts"]]
            assert len(set(places)) == len(places)


def test_selectors_choose_their_own_pods_and_ports_exist(manifests):
    for one in of(manifests, "Deployment", "DaemonSet"):
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert len(chosen(one["spec"]["selector"]["matchLabels"], manifests)) == 1
    for service in of(manifests, "Service"):
        [template] = chosen(service["spec"]["selector"], manifests)
        names = {p["name"] for one in containers(template) for p in one.get("ports", ())}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for template in workloads(manifests).values():
        for container in template["spec"]["containers"]:
            names = {port["name"] for port in container["ports"]}
            assert container["readinessProbe"]["tcpSocket"]["port"] in names


def test_rays_nodes_ask_the_heads_service_at_its_port_and_all_use_the_same_ports(manifests):
    services = {one["metadata"]["name"]: one["spec"] for one in of(manifests, "Service")}
    fixed = []
    for name, template in workloads(manifests).items():
        command = template["spec"]["containers"][0]["command"][-1]
        words = [word for word in command.split() if word.startswith("--")]
        fixed.append({word for word in words if word.split("=")[0].endswith(("-manager-port",))})
        if name == "vmkernel-head":
            assert "--port=6379" in words
            continue
        [address] = [word.partition("=")[2] for word in words if word.startswith("--address=")]
        host, port = address.split(":")
        assert int(port) == services[host]["ports"][0]["port"]
    assert fixed[0] == fixed[1] == fixed[2] != set()


def test_nothing_but_the_policies_openings_reaches_the_pods(manifests):
    policies = {one["metadata"]["name"]: one["spec"] for one in of(manifests, "NetworkPolicy")}
    deny = policies.pop("vmkernel-deny")
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies.values():
        assert chosen(policy["podSelector"]["matchLabels"], manifests)
    # Into head and VM hosts: from pods of this namespace only; into gateways also the hub
    inside = {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "vmkernel"}}}
    for name, template in workloads(manifests).items():
        sources = [
            source
            for policy in policies.values()
            if template in chosen(policy["podSelector"]["matchLabels"], manifests)
            for rule in policy.get("ingress", ())
            for source in rule["from"]
        ]
        others = [source for source in sources if source != inside]
        assert len(others) == (1 if name == "vmkernel-gateway" else 0)
        assert all(set(source) == {"namespaceSelector"} for source in others)
    ports = policies["vmkernel-hub"]["ingress"][0]["ports"]
    assert ports == [{"protocol": "TCP", "port": "jupyter"}]


def test_a_guests_network_leads_to_public_addresses_only(manifests):
    for policy in of(manifests, "NetworkPolicy"):
        if policy["metadata"]["name"] == "vmkernel-guests":
            [block] = policy["spec"]["egress"][0]["to"]
            assert {"10.0.0.0/8", "169.254.0.0/16"} <= set(block["ipBlock"]["except"])
            return
    [host] = of(manifests, "DaemonSet")
    assert host["metadata"]["namespace"] != "elsewhere", "the variant with it has the policy"


def test_pods_have_no_more_rights_than_the_page_says(manifests):
    for name, template in workloads(manifests).items():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "VMKERNEL_HEAD_PORT would be no setting"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        vms = name == "vmkernel-host"
        assert (spec.get("hostUsers") is False) is vms
        profile = spec["securityContext"]["seccompProfile"]["type"]
        assert profile == ("Unconfined" if vms else "RuntimeDefault")
        for container in containers(template):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "privileged" not in security
            assert "memory" in container["resources"]["limits"]
            if container["name"] in ("ray", "image") and vms:
                assert security["procMount"] == "Unmasked"
    pods = [one["spec"] for one in workloads(manifests).values()]
    hosted = [v["hostPath"]["path"] for pod in pods for v in pod["volumes"] if "hostPath" in v]
    assert hosted == ["/var/lib/vmkernel/archives"]


def test_a_vm_hosts_memory_holds_all_its_vms(manifests):
    [config] = of(manifests, "ConfigMap")
    lines = config["data"]["config.toml"].splitlines()
    settings = dict(line.split(" = ", 1) for line in lines)
    slots = int(json.loads(settings["max_concurrent_vms"]))
    memory = int(json.loads(settings["memory"]).removesuffix("M"))
    for container in containers(workloads(manifests)["vmkernel-host"]):
        if container["name"] != "certificate":
            limits = container["resources"]["limits"]
            assert int(limits["memory"].removesuffix("Mi")) >= slots * (memory + 256)


def test_its_configuration_is_one_that_vmkernel_takes(manifests, tmp_path):
    from vmkernel.settings import load_settings

    [config] = of(manifests, "ConfigMap")
    lines = config["data"]["config.toml"].splitlines()
    (tmp_path / "vmkernel").mkdir()
    own = "\n".join(line for line in lines if not line.startswith("locked"))
    (tmp_path / "vmkernel" / "config.toml").write_text(own)
    settings = load_settings(environ={"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)})
    assert settings.sandbox == "required"
    assert settings.max_concurrent_vms in (16, 40)


def test_only_with_tls_there_is_a_ca_and_only_its_init_container_has_the_key(manifests):
    for template in workloads(manifests).values():
        keys = [
            one["name"]
            for one in containers(template)
            if any(mount["name"] == "ray-ca" for mount in one["volumeMounts"])
        ]
        with_tls = template["spec"].get("initContainers", [{}])[0].get("name") == "certificate"
        assert keys == (["certificate"] if with_tls else [])
        for one in containers(template):
            names = {variable["name"] for variable in one["env"]}
            assert ("RAY_USE_TLS" in names) == (with_tls and one["name"] != "certificate")


def test_tokens_are_fresh_each_time_and_not_in_what_is_applied_again():
    first, second = run("--secrets"), run("--secrets")
    assert first != second
    tokens = [one["stringData"]["token"] for one in yaml.safe_load_all(first)]
    assert all(len(token) >= 32 for token in tokens)
    assert not of(list(yaml.safe_load_all(run())), "Secret")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set=slot=3"], "no value 'slot'"),
        (["--set=slots=many"], "'many' is no int"),
        (["--set=slots"], "NAME=VALUE"),
        (["--values=/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_value_is_told(options, told):
    assert told in run(*options, status=2)


def test_a_file_of_values_changes_them(tmp_path):
    changed = tmp_path / "mine.yaml"
    changed.write_text("gateways: 5\n")
    manifests = list(yaml.safe_load_all(run(f"--values={changed}")))
    gateways = [one for one in of(manifests, "Deployment") if one["spec"]["replicas"] == 5]
    assert [one["metadata"]["name"] for one in gateways] == ["vmkernel-gateway"]


def test_the_certificates_shell_makes_one_that_its_ca_signed(tmp_path):
    loader = importlib.machinery.SourceFileLoader("manifests", str(SCRIPT))
    spec = importlib.util.spec_from_loader("manifests", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    ca, tls = tmp_path / "ca", tmp_path / "tls"
    ca.mkdir()
    tls.mkdir()
    openssl = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
               "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=ca", "-days", "1",
               "-keyout", str(ca / "tls.key"), "-out", str(ca / "tls.crt")]  # fmt: skip
    subprocess.run(openssl, check=True, capture_output=True)
    shell = module.CERTIFICATE.replace("/ca/", f"{ca}/").replace("cd /tls", f"cd {tls}")
    environ = {"PATH": "/usr/bin:/bin", "POD_IP": "10.1.2.3"}
    subprocess.run(["sh", "-ec", shell], check=True, env=environ, capture_output=True)
    verify = ["openssl", "verify", "-CAfile", str(tls / "ca.crt"), "-verify_ip", "10.1.2.3",
              str(tls / "tls.crt")]  # fmt: skip
    subprocess.run(verify, check=True, capture_output=True)
    assert (tls / "tls.key").stat().st_mode & 0o077 == 0
