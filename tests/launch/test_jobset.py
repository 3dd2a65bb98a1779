"""The JobSet manifest of launch/.

It is held against the JobSet v1alpha2 API as the package kubeflow-trainer-api carries it: models generated from the
published OpenAPI description, with the Job and Pod parts of Kubernetes. Made strict here: an unknown field is an error.
The enumerations, which that description leaves out, are stated below from the API reference.
"""

import re
import string
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
