"""QEMU's command line: whole, for KVM and TCG, and what must hold for any machine."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from vmkernel.vm.command import Accelerator, Machine, kernel_cmdline, machine_fingerprint, qemu_argv

TSC_KHZ = 2_596_128
Make = Callable[[Accelerator], Machine]


def make_machine(accelerator: Accelerator = "tcg", **changes: object) -> Machine:
    template = Machine(
        vm_id="ab12",
        qemu="/usr/bin/qemu-system-x86_64",
        accelerator=accelerator,
        memory_mib=2048,
        vcpus=1,
        cmdline=kernel_cmdline(accelerator, TSC_KHZ),
        kernel="/images/minimal/vmlinuz",
        initrd="/cache/initrd",
        rootfs="/images/minimal/rootfs.erofs",
        scratch_fd=10,
        ram_path="/cache/template/ram",
        ram_share=True,
        incoming=False,
        monitor_fd=11,
        kernel_port_fd=12,
        agent_port_fd=13,
        control_port_fd=15,
        workspace_port_fd=16,
        network_port_fd=17,
        console_fd=14,
    )
    return msgspec.structs.replace(template, **changes)


def make_clone(accelerator: Accelerator = "tcg", **changes: object) -> Machine:
    machine = make_machine(accelerator, **changes)
    return msgspec.structs.replace(
        machine, kernel=None, initrd=None, ram_share=False, incoming=True
    )


def pairs(argv: list[str]) -> str:
    """An option and its value a line, to be read."""
    text = " ".join(argv[1:])
    return text.replace(" -", "\n-")


TCG_TEMPLATE = """\
-name vmkernel-ab12
-nodefaults
-no-user-config
-display none
-msg timestamp=on
-no-reboot
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-bios qboot.rom
-machine microvm,acpi=on,pit=off,pic=off,rtc=on,ioapic2=off,x-option-roms=off,isa-serial=on,\
memory-backend=ram0,mem-merge=off,dump-guest-core=off
-accel tcg,tb-size=128
-cpu max,la57=off,erms=off,fsrm=off
-smp 1
-m 2048M
-object memory-backend-file,id=ram0,size=2048M,mem-path=/cache/template/ram,share=on
-kernel /images/minimal/vmlinuz
-append console=ttyS0 quiet loglevel=4 panic=-1 reboot=t oops=panic nowatchdog \
psi=0 cgroup_disable=memory apparmor=0 lsm=landlock,yama audit=0 \
random.trust_cpu=on 8250.nr_uarts=1 transparent_hugepage=madvise tsc_early_khz=2596128 \
tsc=reliable clocksource=tsc no_timer_check mitigations=off
-initrd /cache/initrd
-chardev socket,id=monitor,fd=11
-mon chardev=monitor,mode=control
-chardev socket,id=console,fd=14
-serial chardev:console
-blockdev {"driver":"raw","node-name":"root","read-only":true,"file":{"driver":"file",\
"filename":"/images/minimal/rootfs.erofs","aio":"threads","locking":"off"}}
-device virtio-blk-device,drive=root,werror=report,rerror=report
-blockdev {"driver":"qcow2","node-name":"scratch","cache":{"direct":false,"no-flush":true},\
"discard":"unmap","file":{"driver":"file","filename":"/proc/self/fd/10","aio":"threads",\
"locking":"off","cache":{"direct":false,"no-flush":true},"discard":"unmap"}}
-device virtio-blk-device,drive=scratch,werror=report,rerror=report
-object rng-random,id=entropy,filename=/dev/urandom
-device virtio-rng-device,rng=entropy
-device virtio-serial-device,max_ports=8
-chardev socket,id=kernel,fd=12
-device virtserialport,chardev=kernel,name=kernel,nr=1
-chardev socket,id=agent,fd=13
-device virtserialport,chardev=agent,name=agent,nr=2
-chardev socket,id=control,fd=15
-device virtserialport,chardev=control,name=control,nr=3
-chardev socket,id=workspace,fd=16
-device virtserialport,chardev=workspace,name=workspace,nr=4
-chardev socket,id=network,fd=17
-device virtserialport,chardev=network,name=network,nr=5"""

KVM_CLONE = """\
-name vmkernel-ab12
-nodefaults
-no-user-config
-display none
-msg timestamp=on
-no-reboot
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-bios qboot.rom
-machine microvm,acpi=on,pit=off,pic=off,rtc=on,ioapic2=off,x-option-roms=off,isa-serial=on,\
memory-backend=ram0,mem-merge=off,dump-guest-core=off
-accel kvm
-cpu host
-smp 1
-m 2048M
-object memory-backend-file,id=ram0,size=2048M,mem-path=/cache/template/ram,share=off
-chardev socket,id=monitor,fd=11
-mon chardev=monitor,mode=control
-chardev socket,id=console,fd=14
-serial chardev:console
-blockdev {"driver":"raw","node-name":"root","read-only":true,"file":{"driver":"file",\
"filename":"/images/minimal/rootfs.erofs","aio":"threads","locking":"off"}}
-device virtio-blk-device,drive=root,werror=report,rerror=report
-blockdev {"driver":"qcow2","node-name":"scratch","cache":{"direct":false,"no-flush":true},\
"discard":"unmap","file":{"driver":"file","filename":"/proc/self/fd/10","aio":"threads",\
"locking":"off","cache":{"direct":false,"no-flush":true},"discard":"unmap"}}
-device virtio-blk-device,drive=scratch,werror=report,rerror=report
-object rng-random,id=entropy,filename=/dev/urandom
-device virtio-rng-device,rng=entropy
-device virtio-serial-device,max_ports=8
-chardev socket,id=kernel,fd=12
-device virtserialport,chardev=kernel,name=kernel,nr=1
-chardev socket,id=agent,fd=13
-device virtserialport,chardev=agent,name=agent,nr=2
-chardev socket,id=control,fd=15
-device virtserialport,chardev=control,name=control,nr=3
-chardev socket,id=workspace,fd=16
-device virtserialport,chardev=workspace,name=workspace,nr=4
-chardev socket,id=network,fd=17
-device virtserialport,chardev=network,name=network,nr=5
-incoming defer"""


def test_a_tcg_template_in_full() -> None:
    assert pairs(qemu_argv(make_machine("tcg"))) == TCG_TEMPLATE


def test_a_kvm_clone_in_full() -> None:
    assert pairs(qemu_argv(make_clone("kvm"))) == KVM_CLONE


def test_kvm_leaves_the_clock_and_the_mitigations_to_the_guest() -> None:
    words = kernel_cmdline("kvm", TSC_KHZ).split()
    assert not [word for word in words if word.startswith(("tsc", "clocksource", "mitigations"))]


def test_extra_words_come_last() -> None:
    assert kernel_cmdline("tcg", TSC_KHZ, "vmkernel.preload=numpy").endswith(
        " vmkernel.preload=numpy"
    )


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
@pytest.mark.parametrize("make", [make_machine, make_clone])
class TestAnyMachine:
    def test_it_has_no_network_and_is_fenced_in(self, make: Make, accelerator: Accelerator) -> None:
        argv = qemu_argv(make(accelerator))
        assert not [word for word in argv if word in ("-nic", "-net", "-netdev") or "-net" in word]
        sandbox = argv[argv.index("-sandbox") + 1].split(",")
        assert {"on", "spawn=deny", "elevateprivileges=deny"} <= set(sandbox)
        assert "-no-user-config" in argv
        assert "-nodefaults" in argv

    def test_the_root_image_is_read_only(self, make: Make, accelerator: Accelerator) -> None:
        root = next(word for word in qemu_argv(make(accelerator)) if '"node-name":"root"' in word)
        assert msgspec.json.decode(root)["read-only"] is True

    def test_its_descriptors_are_those_on_the_command_line(
        self, make: Make, accelerator: Accelerator
    ) -> None:
        machine = make(accelerator)
        text = " ".join(qemu_argv(machine))
        assert sorted(machine.fds()) == [10, 11, 12, 13, 14, 15, 16, 17]
        for fd in machine.fds():
            assert f"fd={fd}" in text or f"/fd/{fd}" in text

    def test_its_fingerprint_names_no_path_and_no_descriptor(
        self, make: Make, accelerator: Accelerator
    ) -> None:
        text = machine_fingerprint(make(accelerator))
        for word in ("/images", "/cache", "/usr", "ab12", "fd=1", "fd/1"):
            assert word not in text


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_only_a_template_shares_its_memory(accelerator: Accelerator) -> None:
    assert any(word.endswith("share=on") for word in qemu_argv(make_machine(accelerator)))
    assert not any("share=on" in word for word in qemu_argv(make_clone(accelerator)))


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_a_template_and_its_clone_have_one_fingerprint(accelerator: Accelerator) -> None:
    clone = make_clone(accelerator, vm_id="other", scratch_fd=77, monitor_fd=78, ram_path="/x")
    assert machine_fingerprint(make_machine(accelerator)) == machine_fingerprint(clone)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mib": 1024},
        {"vcpus": 2},
        {"cmdline": "quiet"},
        {"accelerator": "kvm"},
        {"scratch_format": "raw"},
        {"scratch_base": "/cache/base"},
    ],
)
def test_what_makes_another_machine_makes_another_fingerprint(change: dict[str, object]) -> None:
    other = msgspec.structs.replace(make_machine(), **change)
    assert machine_fingerprint(other) != machine_fingerprint(make_machine())


def test_a_path_with_a_comma_stays_one_value() -> None:
    argv = qemu_argv(make_machine(ram_path="/tmp/a,share=on/ram", ram_share=False))
    assert any(word.endswith("mem-path=/tmp/a,,share=on/ram,share=off") for word in argv)


def test_a_scratch_disk_over_a_base_names_it_on_the_command_line() -> None:
    argv = qemu_argv(make_machine(scratch_base="/cache/base.raw"))
    scratch = msgspec.json.decode(next(word for word in argv if '"node-name":"scratch"' in word))
    assert scratch["backing"]["read-only"] is True
    assert scratch["backing"]["file"]["filename"] == "/cache/base.raw"
