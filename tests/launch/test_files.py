"""launch/: the shell files are clean and do what their comments say, and the manifest is a JobSet.

The manifest is held against the JobSet v1alpha2 API as the package kubeflow-trainer-api carries it: models generated
from the published OpenAPI description, with the Job and Pod parts of Kubernetes. Made strict here: an unknown field is
an error. The enumerations, which that description leaves out, are stated below from the API reference.
"""

import contextlib
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubeflow_trainer_api.models
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / 'launch'
VALUES = {
  'NAME': 'vit-b16',
  'IMAGE': 'registry.invalid/fmcv:1',
  'SERVICE_ACCOUNT': 'default',
  'ACCELERATOR': 'tpu-v6e-slice',
  'TOPOLOGY': '8x8',
  'HOSTS': '16',
  'CHIPS': '4',
  'SLICES': '2',
  'TRAIN': '--config configs/X.py --workdir gs://bucket/x --config.train.steps=5',
}


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_shell_files_pass_shellcheck(path):
  shellcheck = Path(sys.executable).with_name('shellcheck')
  result = subprocess.run([shellcheck, path], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('name', ['gke_jobset.yaml', 'local.py', 'slurm_gpu.sh', 'tpu_vm.sh'])
def test_every_launch_file_opens_with_what_it_does_and_its_command(name):
  head = (LAUNCH / name).read_text().splitlines()[:20]
  assert any('--config configs/X.py --workdir' in line for line in head)
  assert any(name in line for line in head)


# --- the JobSet manifest


@pytest.fixture(scope='session')
def jobset():
  """A validator of JobSets, strict."""
  schema = kubeflow_trainer_api.models.JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
  definitions = schema['$defs']
  for part in [schema, *definitions.values()]:
    part['additionalProperties'] = False
  # These two are unions, which the generator wraps in classes of its own.
  definitions['IoK8sApimachineryPkgApiResourceQuantity'] = {'type': ['string', 'number']}
  definitions['IoK8sApimachineryPkgUtilIntstrIntOrString'] = {'type': ['string', 'integer']}
  schema['required'] = ['apiVersion', 'kind', 'metadata', 'spec']
  schema['properties'] |= {'apiVersion': {'const': 'jobset.x-k8s.io/v1alpha2'}, 'kind': {'const': 'JobSet'}}
  actions = 'FailJobSet RestartJobSet RestartJobSetAndIgnoreMaxRestarts RestartJob RestartJobAndIgnoreMaxRestarts'
  definitions['JobsetV1alpha2FailurePolicyRule']['properties'] |= {
    'action': {'enum': actions.split()},
    'name': {'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
  }
  strategies = ['Recreate', 'BlockingRecreate', 'InPlaceRestart']
  definitions['JobsetV1alpha2FailurePolicy']['properties']['restartStrategy'] = {'enum': strategies}
  actions = ['FailJob', 'FailIndex', 'Ignore', 'Count']
  definitions['IoK8sApiBatchV1PodFailurePolicyRule']['properties']['action'] = {'enum': actions}
  jsonschema.Draft202012Validator.check_schema(schema)
  return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def manifest():
  return yaml.safe_load(string.Template((LAUNCH / 'gke_jobset.yaml').read_text()).substitute(VALUES))


def job_of(manifest):
  return manifest['spec']['replicatedJobs'][0]['template']['spec']


def container_of(manifest):
  return job_of(manifest)['template']['spec']['containers'][0]


def test_manifest_is_a_jobset(jobset, manifest):
  jobset.validate(manifest)


@pytest.mark.parametrize(
  'spoil',
  [
    lambda manifest: manifest['spec'].update(failurePolicies={}),
    lambda manifest: manifest['spec']['failurePolicy']['rules'][0].update(action='Fail'),
    lambda manifest: manifest['spec']['failurePolicy']['rules'][0].pop('name'),
    lambda manifest: manifest['spec']['replicatedJobs'][0].update(replicas='2'),
    lambda manifest: manifest['spec']['replicatedJobs'][0].pop('template'),
    lambda manifest: job_of(manifest).update(backoffLimits=0),
    lambda manifest: job_of(manifest)['podFailurePolicy']['rules'][0].update(action='Fail'),
    lambda manifest: job_of(manifest)['template']['spec'].pop('containers'),
    lambda manifest: container_of(manifest).update(args='train'),
    lambda manifest: container_of(manifest)['resources'].update(limit={}),
    lambda manifest: container_of(manifest).pop('name'),
  ],
)
def test_the_schema_notices_a_wrong_manifest(jobset, manifest, spoil):
  spoil(manifest)
  with pytest.raises(jsonschema.ValidationError):
    jobset.validate(manifest)


def test_manifest_names_a_value_for_every_variable_in_its_first_lines():
  text = (LAUNCH / 'gke_jobset.yaml').read_text()
  head = text.partition('\napiVersion')[0]
  for name in string.Template(text.partition('\napiVersion')[2]).get_identifiers():
    assert f'{name}=' in head
    assert name in VALUES


def test_manifest_runs_the_training_command_on_every_chip_of_every_host(manifest):
  job, container = job_of(manifest), container_of(manifest)
  assert job['parallelism'] == job['completions'] == 16
  assert manifest['spec']['replicatedJobs'][0]['replicas'] == 2
  assert container['command'] == ['sh', '-c', f'exec python -m fmcv_jax train {VALUES["TRAIN"]}']
  assert {'name': 'FMCV_PROCESSES', 'value': 'auto'} in container['env']
  assert container['resources']['limits'] == container['resources']['requests'] == {'google.com/tpu': 4}
  assert job['template']['spec']['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
    'cloud.google.com/gke-tpu-topology': '8x8',
  }


def test_manifest_restarts_what_was_preempted_and_never_a_user_error(manifest):
  """What the rules decide, on the messages that the Job controller writes."""
  rules = manifest['spec']['failurePolicy']['rules']
  codes = job_of(manifest)['podFailurePolicy']['rules'][0]['onExitCodes']['values']

  def action(reason, message):
    for rule in rules:
      patterns = rule.get('onJobFailureMessagePatterns', [''])
      if reason in rule['onJobFailureReasons'] and any(re.search(pattern, message) for pattern in patterns):
        return rule['action']
    return 'RestartJobSet'  # JobSet's default: at most maxRestarts times

  message = (
    'Container train for pod default/vit-b16-slice-0-1-x2 failed with exit code {} matching FailJob rule at index 0'
  )
  assert set(codes) == {2, 75}
  assert action('PodFailurePolicy', message.format(2)) == 'FailJobSet'
  assert action('PodFailurePolicy', message.format(75)) == 'RestartJobSetAndIgnoreMaxRestarts'
  disrupted = 'Pod default/x-slice-0-1 has condition DisruptionTarget matching FailJob rule at index 1'
  assert action('PodFailurePolicy', disrupted) == 'RestartJobSetAndIgnoreMaxRestarts'
  assert action('BackoffLimitExceeded', 'Job has reached the specified backoff limit') == 'RestartJobSet'
  assert manifest['spec']['failurePolicy']['maxRestarts'] > 0


# --- the Slurm script, with stand-ins for Slurm's commands


@pytest.fixture
def commands(tmp_path):
  """A folder first on PATH; write(name, body) puts a bash command there."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def write(name, body):
    path = folder / name
    path.write_text(f'#!/bin/bash\n{body}\n')
    path.chmod(0o755)
    return path

  write.env = os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}'}
  return write


@pytest.fixture
def sbatch(tmp_path, commands):
  """Runs the script as Slurm would: `body` is what each process does, in bash, its arguments the training command."""
  commands('scontrol', f'if [ "$1" = show ]; then echo gpu07; echo gpu08; else echo "$@" >> {tmp_path}/scontrol; fi')
  # Every process in turn; like the real one, srun ends with the highest status.
  commands(
    'srun',
    """
    while [[ $1 == --* ]]; do shift; done
    worst=0
    for ((process = 0; process < SLURM_NTASKS; process++)); do
      code=0
      SLURM_PROCID=$process SLURM_LOCALID=$((process % SLURM_NTASKS_PER_NODE)) "$@" || code=$?
      ((code > worst)) && worst=$code
    done
    exit $worst""",
  )

  def run(body, nodes=2, per_node=1, gpus=8, restarts=0):
    python = commands('python-of-the-run', body)
    slurm = {
      'SLURM_JOB_ID': '8200',
      'SLURM_JOB_NODELIST': 'gpu[07-08]',
      'SLURM_NTASKS': str(nodes * per_node),
      'SLURM_NTASKS_PER_NODE': str(per_node),
      'SLURM_GPUS_ON_NODE': str(gpus),
      'SLURM_RESTART_COUNT': str(restarts),
      'PYTHON': str(python),
    }
    script = [LAUNCH / 'slurm_gpu.sh', '--config', 'configs/X.py', '--workdir', 'a folder']
    result = subprocess.run(['bash', *script], env=commands.env | slurm, capture_output=True, text=True, timeout=60)
    log = tmp_path / 'scontrol'
    result.requeued = log.exists() and log.read_text() == 'requeue 8200\n'
    return result

  return run


SHOW = 'echo "$FMCV_COORDINATOR $FMCV_PROCESSES $FMCV_PROCESS $JAX_LOCAL_DEVICE_IDS"'


def test_slurm_one_process_a_node_drives_all_of_its_gpus(sbatch):
  result = sbatch(SHOW)
  assert result.stdout.splitlines() == ['gpu07:61448 2 0 0,1,2,3,4,5,6,7', 'gpu07:61448 2 1 0,1,2,3,4,5,6,7']


def test_slurm_one_process_a_gpu_drives_its_own(sbatch):
  result = sbatch(SHOW, per_node=2, gpus=2)
  assert result.stdout.splitlines() == [f'gpu07:61448 4 {process} {process % 2}' for process in range(4)]


def test_slurm_processes_of_a_node_share_its_gpus_evenly_or_not_at_all(sbatch):
  result = sbatch(SHOW, nodes=1, per_node=2, gpus=8)
  assert [line.split()[-1] for line in result.stdout.splitlines()] == ['0,1,2,3', '4,5,6,7']
  result = sbatch(SHOW, nodes=1, per_node=3, gpus=8)
  assert result.returncode == 2
  assert '8 GPUs are not divisible by 3 processes' in result.stderr
  assert not result.requeued


def test_slurm_runs_the_training_command_with_its_arguments_intact(sbatch):
  result = sbatch('printf "<%s>" "$@"', nodes=1)
  assert result.stdout == '<-m><fmcv_jax><train><--config><configs/X.py><--workdir><a folder>'


@pytest.mark.parametrize(
  ('ending', 'restarts', 'requeued'),
  [
    ('exit 0', 0, False),
    ('exit 1', 0, False),
    ('exit 2', 0, False),
    ('exit 75', 0, True),
    ('exit 75', 50, True),
    ('kill -KILL $$', 0, True),
    ('kill -KILL $$', 5, False),
  ],
)
def test_slurm_requeues_what_was_preempted_or_killed_and_nothing_else(sbatch, ending, restarts, requeued):
  result = sbatch(ending, restarts=restarts)
  assert result.requeued == requeued
  assert result.returncode == (int(ending.split()[1]) if 'exit' in ending else 137)


# --- the TPU VM script, with a stand-in for gcloud whose hosts are folders on this machine

GCLOUD = """
# The arguments are: compute tpus queued-resources VERB ...
echo "$4" >> "$WORLD/log"
verb=$4; shift 4
for argument in "$@"; do
  case $argument in
    --command=*) command=${argument#--command=} ;;
    --node=0) hosts=host0 ;;
    --node=all) hosts='host0 host1' ;;
    --node-id=* | --accelerator-type=*) echo "$argument" >> "$WORLD/asked" ;;
  esac
done
case $verb in
  list) cat "$WORLD/state" 2>/dev/null || true ;;
  create) echo ACTIVE > "$WORLD/state" ;;
  delete) # the hosts and what runs on them are gone
    for host in host0 host1; do kill -KILL -- -"$(cat "$WORLD/$host/fmcv/pid")"; done
    rm -r "$WORLD/host0" "$WORLD/host1" "$WORLD/state" ;;
  scp) for host in $hosts; do mkdir -p "$WORLD/$host"; cp "$1" "$WORLD/$host/${2#*:}"; done ;;
  ssh)
    for host in $hosts; do
      mkdir -p "$WORLD/$host"
      (cd "$WORLD/$host" && HOST=$host HOME=$WORLD/$host bash -c "$command") || exit
    done ;;
esac
"""

# Stands in for the host's python3: pip and uv do nothing but make the environment's python, which runs $TRAINING.
PYTHON3 = """
echo "$@" >> "$WORLD/$HOST.installs"
if [[ "$*" == *'uv venv'* ]]; then
  mkdir -p ../venv/bin
  printf '#!/bin/bash\\n%s\\n' "$TRAINING" > ../venv/bin/python
  chmod +x ../venv/bin/python
fi
"""


@pytest.fixture
def tpu(tmp_path, commands):
  """Runs the script on two hosts that are folders; `training` is what the run does there, in bash."""
  world = tmp_path / 'world'
  world.mkdir()
  commands('gcloud', GCLOUD)
  commands('python3', PYTHON3)
  # A small working tree, as the real one takes a second to pack.
  tree = tmp_path / 'tree'
  (tree / 'launch').mkdir(parents=True)
  shutil.copy(LAUNCH / 'tpu_vm.sh', tree / 'launch')
  (tree / 'constraints.txt').touch()
  subprocess.run(['git', 'init', '--quiet', tree], check=True)

  def run(*arguments, training='', wait=True, **values):
    settings = {'NAME': 'x', 'ZONE': 'z', 'PAUSE': '0', 'POLL': '0.2', 'WORLD': str(world), 'TRAINING': training}
    process = subprocess.Popen(
      ['bash', tree / 'launch' / 'tpu_vm.sh', *arguments],
      env=commands.env | settings | values,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    if wait:
      process.output, process.errors = process.communicate(timeout=60)
    return process

  run.world = world
  yield run
  for path in world.glob('*/fmcv/pid'):  # a run that a failed test left
    with contextlib.suppress(ProcessLookupError, ValueError):
      os.killpg(int(path.read_text()), signal.SIGKILL)


def test_tpu_vm_asks_for_a_slice_installs_trains_on_all_hosts_and_ends_with_the_runs_status(tpu):
  training = 'echo "$HOST $FMCV_PROCESSES"; printf "<%s>" "$@" > "$WORLD/$HOST.arguments"'
  result = tpu('run', '--config', 'configs/X.py', '--workdir', "gs://b/it's", training=training)
  assert result.returncode == 0, result.errors
  assert result.output == 'host0 auto\n'
  assert (tpu.world / 'asked').read_text().split() == ['--node-id=x', '--accelerator-type=v6e-64']
  for host in ('host0', 'host1'):
    arguments = (tpu.world / f'{host}.arguments').read_text()
    assert arguments == "<-m><fmcv_jax><train><--config><configs/X.py><--workdir><gs://b/it's>"
    assert '.[tpu]' in (tpu.world / f'{host}.installs').read_text()
    assert (tpu.world / host / 'fmcv' / 'code' / 'constraints.txt').exists()


def test_tpu_vm_starts_a_preempted_or_crashed_run_again_and_never_a_user_error(tpu):
  training = """
    echo start >> starts
    case $(wc -l < starts) in 1) exit 75 ;; 2) exit 134 ;; 3) exit 2 ;; esac"""
  result = tpu('run', training=training)
  assert result.returncode == 2, result.errors
  for host in ('host0', 'host1'):
    assert (tpu.world / host / 'fmcv' / 'code' / 'starts').read_text().count('start') == 3


def test_tpu_vm_gives_up_on_a_run_that_crashes_again_and_again(tpu):
  result = tpu('run', training='echo start >> starts; exit 1', RESTARTS='2')
  assert result.returncode == 1
  assert (tpu.world / 'host1' / 'fmcv' / 'code' / 'starts').read_text().count('start') == 3


def test_tpu_vm_asks_again_when_the_slice_was_taken_away_and_resumes(tpu):
  training = """
    echo start >> "$WORLD/$HOST.starts"
    [ "$(wc -l < "$WORLD/$HOST.starts")" = 2 ] && exit 0
    [ "$HOST" = host1 ] && echo SUSPENDED > "$WORLD/state"
    sleep 60"""
  result = tpu('run', training=training)
  assert result.returncode == 0, result.errors
  assert 'x was taken away' in result.errors
  verbs = (tpu.world / 'log').read_text().split()
  assert [verb for verb in verbs if verb in ('create', 'delete')] == ['create', 'delete', 'create']


def test_tpu_vm_stop_lets_the_run_save_and_ends_it(tpu):
  training = """
    trap 'touch "$WORLD/$HOST.saved"; exit 75' TERM
    touch "$WORLD/$HOST.ready"
    while true; do sleep 0.05; done"""
  running = tpu('run', training=training, wait=False)
  while running.poll() is None and not all((tpu.world / f'host{i}.ready').exists() for i in range(2)):
    time.sleep(0.05)
  assert tpu('stop').returncode == 0
  running.output, running.errors = running.communicate(timeout=30)
  assert running.returncode == 75, running.errors
  assert all((tpu.world / f'host{i}.saved').exists() for i in range(2))


def test_tpu_vm_says_what_it_needs(tpu):
  result = tpu('run', NAME='')
  assert result.returncode == 2
  assert result.errors.startswith('set NAME')
  result = tpu()
  assert result.returncode == 2
  assert 'launch/tpu_vm.sh run --config' in result.output
