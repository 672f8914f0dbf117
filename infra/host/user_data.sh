#!/bin/bash
# First boot of a host (Ubuntu 24.04): fetch the application, install it, ship its log, tell CloudFormation.
# Words between @ signs are filled in by the stack. Nothing here needs the internet: S3, CloudWatch Logs and
# CloudFormation are reached through endpoints where the VPC has no other way out. Output: /var/log/cloud-init-output.log
set -euo pipefail

region=@REGION@
application=/opt/mlflow-proxy-setup
metadata=http://169.254.169.254/latest

# Credentials of the instance's role, as options that curl reads from standard input: so no process list shows them.
credentials() {
  local token role
  token=$(curl -fsS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/api/token")
  role=$(curl -fsS -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/iam/security-credentials/")
  curl -fsS -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/iam/security-credentials/$role" |
    python3 -c 'import json, sys; c = json.load(sys.stdin)
print("user = \"%(AccessKeyId)s:%(SecretAccessKey)s\"\nheader = \"x-amz-security-token: %(Token)s\"" % c)'
}

# Tell CloudFormation SUCCESS or FAILURE: a deployment waits for it, and is undone without. A host tells it once, also if
# the script ends before its time. For a host that Auto Scaling starts later no deployment waits: CloudFormation then
# answers ValidationError, which is no error here, and trying again would not change it. Anything else may pass, also
# with status 400: that is how CloudFormation says that it is called too often.
signal() {
  local token id pause answer
  trap - EXIT
  token=$(curl -fsS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/api/token")
  id=$(curl -fsS -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/instance-id")
  for pause in 1 2 4 8 16 0; do
    answer=$(credentials | curl -sS --fail-with-body --connect-timeout 10 --max-time 30 \
      --aws-sigv4 "aws:amz:$region:cloudformation" --config - "https://cloudformation.$region.amazonaws.com/" \
      --data-urlencode Action=SignalResource --data-urlencode Version=2010-05-15 \
      --data-urlencode 'StackName=@STACK@' --data-urlencode 'LogicalResourceId=@GROUP@' \
      --data-urlencode "UniqueId=$id" --data-urlencode "Status=$1") && return 0
    echo "CloudFormation did not take $1: $answer"
    if [[ $answer == *'<Code>ValidationError</Code>'* ]]; then
      echo "No deployment waits for this host."
      return 0
    fi
    sleep "$pause"
  done
  return 1
}
trap 'signal FAILURE' EXIT

mkdir -p "$application"
credentials | curl -fsS --retry 5 --retry-all-errors --aws-sigv4 "aws:amz:$region:s3" --config - \
  -o "$application.zip" 'https://@BUCKET@.s3.@REGION@.amazonaws.com/@KEY@'
python3 -m zipfile -e "$application.zip" "$application"

cat >"$application/proxy.toml" <<'PROXY_TOML'
@PROXY_TOML@
PROXY_TOML

# The service writes to the journal under the name mlflow-proxy; rsyslog keeps a copy that the agent can read.
cat >/etc/rsyslog.d/30-mlflow-proxy.conf <<'RSYSLOG'
template(name="line" type="string" string="%msg:2:$%\n")
if $programname == "mlflow-proxy" then { action(type="omfile" file="/var/log/mlflow-proxy.log" template="line") stop }
RSYSLOG
cat >/etc/logrotate.d/mlflow-proxy <<'LOGROTATE'
/var/log/mlflow-proxy.log {
  daily
  rotate 3
  maxsize 200M
  missingok
  compress
  copytruncate
}
LOGROTATE
systemctl restart rsyslog

# The CloudWatch agent sends the log away. AWS's guide names the region's bucket for the package and its signature, but
# only the general one for the key; a closed network reaches no other than the region's. If anything can be had from
# neither, the host goes on without: the service matters more than the copy of its log, and a host that gave up here
# would undo the whole deployment. What was fetched but is not AWS's ends the script: somebody tampers with it.
agent=amazon-cloudwatch-agent
buckets=("https://amazoncloudwatch-agent-$region.s3.$region.amazonaws.com" "https://amazoncloudwatch-agent.s3.amazonaws.com")
fetched=$(mktemp -d)

# fetch PATH…: all from one bucket, so that a package and its signature are of the same version. The limits are for a
# network that drops what goes to the general bucket: about 20 seconds.
fetch() {
  local bucket path
  for bucket in "${buckets[@]}"; do
    for path in "$@"; do
      curl -fsS --retry 2 --connect-timeout 5 --speed-time 20 -o "$fetched/${path##*/}" "$bucket/$path" || continue 2
    done
    return 0
  done
  echo "The CloudWatch agent is left out: not to be had from ${buckets[*]}: $*."
  echo "This host's log stays in /var/log/mlflow-proxy.log, and does not come to CloudWatch Logs."
  return 1
}

if fetch "ubuntu/@DPKG_ARCHITECTURE@/latest/$agent.deb"{,.sig} && fetch "assets/$agent.gpg"; then
  # The fingerprint is the one in the CloudWatch guide, "Verifying the signature of the CloudWatch agent package".
  # gpgv wants the key without its armor.
  fingerprint=937616F3450B7D806CBD9725D58167303B789C72
  python3 -c 'import base64, re, sys
key = sys.stdin.buffer.read()
armored = re.search(rb"-{5}BEGIN.*?\r?\n\r?\n(.*?)(\n=|\n-)", key, re.S)
sys.stdout.buffer.write(base64.b64decode(armored[1]) if armored else key)' <"$fetched/$agent.gpg" >"$fetched/key"
  gpgv --status-fd 1 --keyring "$fetched/key" "$fetched/$agent.deb.sig" "$fetched/$agent.deb" |
    grep "^\[GNUPG:\] VALIDSIG .* $fingerprint\$"
  dpkg -i "$fetched/$agent.deb"
  cat >/opt/aws/$agent/etc/proxy.json <<'AGENT'
{"logs": {"logs_collected": {"files": {"collect_list": [
  {"file_path": "/var/log/mlflow-proxy.log", "log_group_name": "@LOG_GROUP@", "log_stream_name": "{instance_id}/proxy"},
  {"file_path": "/var/log/cloud-init-output.log", "log_group_name": "@LOG_GROUP@", "log_stream_name": "{instance_id}/first-boot"}
]}}}}
AGENT
  /opt/aws/$agent/bin/amazon-cloudwatch-agent-ctl -a fetch-config -m ec2 -s -c file:/opt/aws/$agent/etc/proxy.json
fi
rm -r "$fetched"

# Starts the service, waits for its health, and fails if that does not come.
bash "$application/deploy/install.sh" --wheelhouse "$application/wheelhouse" --config "$application/proxy.toml"
signal SUCCESS
