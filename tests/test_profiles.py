"""Profiles of clusters: the examples load, and what is wrong with one is said in one sentence."""

from __future__ import annotations

import json

import pytest

from pruners.interface.suggest import UsageError
from slurm import profile
from slurm.profile import ProfileError


def write(folder, *lines: str) -> str:
    path = folder / "mine.toml"
    path.write_text("\n".join(("teraflops = 1", *lines)))
    return str(path)


@pytest.mark.parametrize("name", profile.names())
def test_every_profile_that_comes_along_can_be_used(name):
    assert profile.load(name).teraflops > 0


def test_the_two_examples_and_the_default_are_there():
    assert set(profile.names()) == {"container", "cpu", "gpu_partition"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('partion = "gpu"', "Unknown key 'partion'. Did you mean partition or"),
        ('hours = "long"', "hours: Input should be a valid number"),
        ('hours = "24"', "hours: Input should be a valid number"),
        ("hours = inf", "hours: Input should be a finite number"),
        ("hours = nan", "hours: Input should be"),
        ("cpus = true", "cpus: Input should be a valid integer"),
        ("parallel = 0", "parallel: Input should be greater than or equal to 1"),
        ('gres = "gpu:1"', "gres and gpu_memory_gb belong together"),
        ('gres = "gpu:1"', "add e.g. gpu_memory_gb = 80, the memory of one GPU in GB"),
        ("gpu_memory_gb = 80", 'add e.g. gres = "gpu:1", the name of one GPU at the site'),
        ("setup = [", "is not TOML"),
        ("setup = " + 20_000 * "[", "is nested too deeply"),
        ('options = {time = "1:00"}', "time is set by the job itself"),
        ("options = {ntasks = 4}", "ntasks is set by the job itself"),
        ("options = {nodes = 4}", "nodes is set by the job itself"),
        ("options = {ntasks_per_node = 4}", "ntasks-per-node is set by the job itself"),
        ("options = {tasks-per-node = 4}", "tasks-per-node is set by the job itself"),
        ("options = {no-requeue = true}", "no-requeue is set by the job itself"),
        ('options = {sig = "x"}', "signal is set by the job itself"),
        *(
            (f'{key} = "a"\noptions = {{{key} = "p"}}', f"options: {key} is a key of the profile itself; set it there")
            for key in ("partition", "account", "qos", "constraint")
        ),
        ('options = {part = "p"}', "options: partition is a key of the profile itself; set it there"),
        ("hours = 1e-300", "hours = 1e-300 lets a job run for 60 seconds, and its warning comes 120 seconds before"),
        ("hours = 1\nwarning_seconds = 3600", "give more hours or fewer warning_seconds"),
        ("hours = 1e300", "hours: Input should be less than or equal to 10000"),
        (f"hours = {10**400}", "hours: Input should be"),
        (f"cpus = {10**400}", "cpus: Input should be"),
        (f"parallel = {10**30}", "parallel: Input should be less than or equal to 1000000"),
        (f"cpus = {'1' * 5000}", "holds a number of thousands of digits"),
        ('options = {comment = "a\\n#SBATCH --time=1"}', "options.comment holds a line break"),
        ('options = {"comment=x\\nrm" = "a"}', "is not an option of sbatch"),
        ('options = {"--comment" = "a"}', "is not an option of sbatch"),
        ('environment = {"A=1;rm -r x;B" = "a"}', "is not a valid variable name"),
        ('environment = {"A B" = "a"}', "is not a valid variable name"),
        ('partition = "gpu\\n#SBATCH -t 1"', "partition holds a line break"),
        ('python = "python\\nrm"', "python holds a line break"),
        ('account = ""', "account is empty"),
        ('environment = {HF_TOKEN = "hf_x"}', "HF_TOKEN looks like a secret"),
        ('setup = ["export WANDB_API_KEY=1"]', "WANDB_API_KEY looks like a secret"),
        ('python = "env HF_TOKEN=x python"', "HF_TOKEN looks like a secret"),
        ('options = {export = "ALL,HF_TOKEN=x"}', "HF_TOKEN looks like a secret"),
        ('setup = ["module load a\\nexport HF_TOKEN=x"]', "HF_TOKEN looks like a secret"),
    ],
)
def test_what_is_wrong_with_a_profile_is_one_sentence(tmp_path, line, said):
    with pytest.raises(ProfileError) as error:
        profile.load(write(tmp_path, line))
    assert said in str(error.value)
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["1e-300", "1e300", "0", "-1"])
def test_teraflops_beyond_any_machine_are_refused(tmp_path, value):
    (path := tmp_path / "p.toml").write_text(f"teraflops = {value}\n")
    with pytest.raises(ProfileError, match=r"teraflops: Input should be (greater|less) than or equal to"):
        profile.load(str(path))


def test_other_options_of_sbatch_are_let_through(tmp_path):
    one = 'ntasks = 1, nodes = "1"'
    options = (
        f'options = {{exclude = "n1", exclusive = true, {one}, mail-type = "FAIL", nodelist = "n2", comment = "a"}}'
    )
    assert set(profile.load(write(tmp_path, options)).options) >= {"nodelist", "exclusive"}


def test_every_key_that_must_be_there_says_what_to_put(tmp_path):
    for name, field in profile.Profile.model_fields.items():
        assert not field.is_required() or f"{name} = " in (field.description or "")
    (path := tmp_path / "p.toml").write_text('gres = "gpu:1"\ngpu_memory_gb = 80\n')
    with pytest.raises(ProfileError) as error:
        profile.load(str(path))
    assert str(error.value) == (
        f"{path}: teraflops is missing; set the throughput that one GPU sustains in 16-bit formats, e.g. "
        "teraflops = 60 for an A100, "
        "or 0.1 for 8 cores."
    )


SECRETS = """hf auth login --token SECRET
hf auth login --token=SECRET
hf auth login SECRET
huggingface-cli login --token SECRET
wandb login SECRET
wandb login --relogin SECRET
wandb login --host https://wandb.example.org SECRET
set -x HF_TOKEN SECRET
set -gx HF_TOKEN SECRET
setenv WANDB_API_KEY SECRET
curl -H 'Authorization: Bearer SECRET' https://example.org
curl -H "Authorization: token SECRET" https://example.org
curl -H "PRIVATE-TOKEN: SECRET" https://example.org
curl -H "X-Api-Key: SECRET" https://example.org
curl -u me:SECRET https://example.org
curl https://example.org/file?access_token=SECRET
https_proxy=http://u:SECRET@proxy
HF_ENDPOINT=https://u:SECRET@mirror
DATABASE_URL=postgres://u:SECRET@host/base
git clone https://x:SECRET@host/repository
git clone https://SECRET@host/repository
pip install --index-url https://u:SECRET@host/simple package
git config --global http.extraheader "AUTHORIZATION: basic SECRET"
PGPASS=SECRET
export PGPASSWORD=SECRET
export AWS_SECRET_ACCESS_KEY=SECRET
export my_password="SECRET"
export HF_TOKEN=${HF_TOKEN:-SECRET}
export HF_TOKEN=$(echo SECRET)
aws configure set aws_secret_access_key SECRET
docker login --username me --password SECRET
python train.py --hf-token SECRET
python train.py --api_key SECRET
apptainer exec --env HF_TOKEN=SECRET image.sif python
echo SECRET | hf auth login --token-stdin
echo "machine api.wandb.ai login user password SECRET" >> ~/.netrc
sshpass -p SECRET ssh host
docker login -u me -p SECRET registry.example.org
podman login -pSECRET registry.example.org
az login --service-principal -u me -p SECRET --tenant t
vault login SECRET
mysql -u me -pSECRET base
printf '{"token": "SECRET"}' > config.json
python -c 'import wandb; wandb.login(key="SECRET")'
export HF_TOKEN_READ=SECRET
export WANDB_API_KEY_TEAM=SECRET
export TOKEN_HF=SECRET
HF_TOKEN+=SECRET
export HF_TOKEN="$PREFIX"SECRET
export HF_TOKEN=$PREFIX"SECRET"
curl -sSu me:SECRET https://example.org
curl --user=me:SECRET https://example.org
curl -sSU me:SECRET -x proxy:3128 https://example.org
export http_proxy=u:SECRET@proxy:3128
export HTTPS_PROXY="u:SECRET@proxy"
curl -x u:SECRET@proxy:3128 https://example.org
docker login --password-stdin <<< SECRET
docker login -u me --password-stdin <<<"SECRET" registry.example.org
echo -n SECRET | docker login --password-stdin
printf '%s' SECRET | docker login --password-stdin
echo SECRET > $HF_HOME/token
echo -n "SECRET" >> ~/.hf_token
printf '%s\\n' SECRET > token.txt
echo SECRET | tee $HF_HOME/token
cat > $HF_HOME/token <<< SECRET
echo hf_abcdefghijklmnopqrstuvwxyz > ~/.cache/huggingface/token
export HF_TOKEN2=SECRET
python -c 'import os; os.environ["HF_TOKEN"]="SECRET"'
python -c "import os; os.environ['HF_TOKEN'] = 'SECRET'"
curl -H "X-Vault-Token: SECRET" https://vault.example.org
curl -H 'X-My-Api-Key: SECRET' https://example.org
gpg --batch --passphrase SECRET -d a.gpg
gpg --passphrase=SECRET -d a.gpg
export STORE="DefaultEndpointsProtocol=https;AccountName=a;AccountKey=SECRET;EndpointSuffix=core.windows.net"
curl -d "{}" https://hooks.slack.com/services/T00000000/B00000000/SECRETSECRETSECRET
lftp -u me,SECRET sftp://example.org
lftp -e "mirror a b" -u "me,SECRET" example.org
smbclient -U me%SECRET //host/share
smbclient -U "DOMAIN/me%SECRET" //host/share""".splitlines()
HARMLESS = """module load cuda/12.4
source .venv/bin/activate
set -x
set -euxo pipefail
wandb login
wandb login --relogin
wandb login $WANDB_API_KEY
hf auth login --token "$HF_TOKEN"
export HF_TOKEN=$HF_TOKEN
export HF_TOKEN="$(cat ~/.hf_token)"
export HF_TOKEN=
unset HF_TOKEN
export HF_TOKEN_PATH=/home/me/.token
export PGPASSFILE=/home/me/.pgpass
HF_HUB_DISABLE_IMPLICIT_TOKEN=1
HF_HUB_ENABLE_HF_TRANSFER=1
TOKENIZERS_PARALLELISM=false
pip install hf_transfer
curl -H "Authorization: Bearer $HF_TOKEN" https://example.org
https_proxy=http://proxy.example.org:3128
https_proxy=http://$USER:$PASSWORD@proxy:3128
HF_ENDPOINT=https://mirror.example.org
git clone git@example.org:a/b.git
git clone ssh://git@example.org/a/b.git
pip install package@https://example.org/a.whl
ssh login01 true
ssh -p 2222 login01 true
scp -P 22 a host:b
docker login -u me --password-stdin registry.example.org < ~/.token
docker login -u me -p "$(cat ~/.token)" registry.example.org
mysql -u me -p base
rsync -a me@host:/data /scratch
echo the password is not here
export PWD=/scratch
export HF_HOME=/scratch/x
export OMP_NUM_THREADS=8
export TOKENIZERS_PARALLELISM=false
export TOKEN_COUNT=5
export OS_TOKEN_ENDPOINT=https://example.org
export HF_TOKEN="$PREFIX$SUFFIX"
export HF_TOKEN=${PREFIX}"$SUFFIX"
module load cuda
python train.py --max-tokens 5
python train.py --tokenizer gpt2 --token-type-ids 0
curl -sSLo out.sh https://example.org/a.sh
curl -sSu "me:$PASSWORD" https://example.org
curl -sSu $USER:$PASSWORD https://example.org
export http_proxy=proxy.example.org:3128
export http_proxy=$USER:$PASSWORD@proxy:3128
export no_proxy=localhost,127.0.0.1
docker pull registry.example.org/image:24.01@sha256:0c0ffee0c0ffee
docker login -u me --password-stdin <<< "$TOKEN"
echo "$TOKEN" | docker login --password-stdin
echo $HF_TOKEN > $HF_HOME/token
echo "the run begins" > run.log
echo done > tokens.txt
echo start | tee tokenizer.log
cat < ~/.token > $HF_HOME/token
curl -fsSL https://example.org/a.tgz -o a.tgz && rsync -au nas:/data/c4 $TMPDIR/
curl -fsSL https://example.org/a.sh && bash -eu script:foo
export TIKTOKEN_RS_CACHE=/x
export TOKEN_EMBEDDING_DIM=5
export NCCL_PAT_THRESHOLD=5
export AZURE_CREDENTIALS_MODE=x
export GIT_CREDENTIALS_HELPER=x
echo ok > status.token
echo $(date) > job.token
export PATH=$PATH:$HOME/bin
export BYPASS=1
export USE_OAUTH2=1
export NUM_TOKEN2=5
export PASS2=1
export HF_TOKEN2=$HF_TOKEN2
curl -H "X-Vault-Token: $VAULT_TOKEN" https://vault.example.org
curl -H "X-Cache-Key: abc" https://example.org
gpg --batch --passphrase-fd 0 -d a.gpg < ~/.passphrase
gpg --passphrase "$PASSPHRASE" -d a.gpg
lftp -u me sftp://example.org
lftp -u "me,$PASSWORD" sftp://example.org
lftp -u me example.org -e "mirror a b, c"
smbclient -U me //host/share
smbclient -U me%$PASSWORD //host/share
curl https://hooks.slack.com/services/$SLACK_PATH
export PYTHONPATH=$PWD:$PYTHONPATH
export XDG_CACHE_HOME=$SCRATCH/cache
apptainer exec --nv --bind $PWD pruning.sif python
eval "$(conda shell.bash hook)" """.splitlines()


def quoted(line: str) -> str:
    return "setup = [" + json.dumps(line) + "]"


@pytest.mark.parametrize("line", SECRETS)
def test_a_secret_in_any_form_is_refused_and_not_repeated(tmp_path, line):
    with pytest.raises(ProfileError, match="looks like a secret") as error:
        profile.load(write(tmp_path, quoted(line)))
    assert "SECRET " not in f"{error.value} ".replace("SECRET_ACCESS", "")


@pytest.mark.parametrize("line", HARMLESS)
def test_a_line_without_a_secret_is_let_through(tmp_path, line):
    assert profile.load(write(tmp_path, quoted(line))).setup == (line,)


@pytest.mark.parametrize(
    "line",
    [
        "echo " + 500 * "`a`" + " y",
        3000 * "token_",
        "export A=" + 300 * "`hostname`-",
        500 * "lftp -u a ",
        500 * "smbclient -U a ",
        1500 * "x-a-",
        500 * "AccountKey ",
        500 * "--passphrase-fd 0 ",
    ],
)
def test_no_line_takes_long_to_be_looked_at(tmp_path, line):
    """For ever, if it were looked at in every way in which it can be read."""
    assert profile.load(write(tmp_path, quoted(line))).setup == (line,)


def test_a_variable_that_only_sounds_like_a_secret_is_let_through(tmp_path):
    path = write(tmp_path, 'environment = {TOKENIZERS_PARALLELISM = "false"}')
    assert profile.load(path).environment == {"TOKENIZERS_PARALLELISM": "false"}


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean gpu_partition"):
        profile.load("gpu_partion")


def test_a_profile_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes("# größer\nteraflops = 1\n".encode("latin-1"))
    with pytest.raises(ProfileError, match=r"mine\.toml is not UTF-8 text \(byte 5\)"):
        profile.load(str(path))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfteraflops = 1\n")
    assert profile.load(str(path)).teraflops == 1
