-- A record of VMs as the schema's version 1 had it (sqlite3 vms.sqlite .dump), with three VMs.
-- Never changed: every later vmkernel must open it.
PRAGMA user_version = 1;
CREATE TABLE vms (
    vm_id TEXT PRIMARY KEY,
    name TEXT NOT NULL DEFAULT '',
    owner INTEGER NOT NULL,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    runner_pid INTEGER NOT NULL DEFAULT 0,
    runner_start INTEGER NOT NULL DEFAULT 0,
    qemu_pid INTEGER NOT NULL DEFAULT 0,
    qemu_start INTEGER NOT NULL DEFAULT 0,
    slot INTEGER,
    template TEXT NOT NULL DEFAULT '',
    recipe TEXT NOT NULL DEFAULT '',
    language TEXT NOT NULL DEFAULT '',
    accelerator TEXT NOT NULL DEFAULT '',
    memory INTEGER NOT NULL DEFAULT 0,
    vcpus INTEGER NOT NULL DEFAULT 1,
    tenant_id TEXT NOT NULL DEFAULT '',
    task_id TEXT NOT NULL DEFAULT '',
    kernel_id TEXT NOT NULL DEFAULT '',
    connection_file TEXT NOT NULL DEFAULT '',
    notebook TEXT NOT NULL DEFAULT '',
    directory TEXT NOT NULL DEFAULT '',
    log_dir TEXT NOT NULL DEFAULT '',
    exit_cause TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX names ON vms (name) WHERE name != '';
INSERT INTO vms
    (vm_id, name, owner, state, created, started, ended, runner_pid, runner_start, qemu_pid, qemu_start, slot, template,
    recipe, language, accelerator, memory, vcpus, tenant_id, task_id, kernel_id, connection_file, notebook, directory, log_dir, exit_cause)
    VALUES ('vm-00000001', '', 0, 'running', 1790000000.5, 1790000001.25, NULL, 4000000, 11, 4000001, 12, 0, 'kkkkkkkk', 'minimal', '', 'tcg', 512, 1, '', '', 'k-1', 'k-1', '', '', '/s/logs/vm-00000001', '');
INSERT INTO vms
    (vm_id, name, owner, state, created, started, ended, runner_pid, runner_start, qemu_pid, qemu_start, slot, template,
    recipe, language, accelerator, memory, vcpus, tenant_id, task_id, kernel_id, connection_file, notebook, directory, log_dir, exit_cause)
    VALUES ('vm-00000002', 'mine', 0, 'stopped', 1790000002.0, 1790000003.0, 1790000004.0, 4000002, 13, 4000003, 14, 1, '', 'datascience', 'python', 'kvm', 2048, 2, 'tenant', 'task', '', '', '', '/r/vms/vm-00000002', '/s/logs/vm-00000002', '');
INSERT INTO vms
    (vm_id, name, owner, state, created, started, ended, runner_pid, runner_start, qemu_pid, qemu_start, slot, template,
    recipe, language, accelerator, memory, vcpus, tenant_id, task_id, kernel_id, connection_file, notebook, directory, log_dir, exit_cause)
    VALUES ('vm-00000003', '', 0, 'failed', 1790000005.0, NULL, 1790000006.0, 0, 0, 0, 0, NULL, '', '', '', '', 0, 1, '', '', '', '', 'a.ipynb', '', '', 'QEMU didn''t start');
