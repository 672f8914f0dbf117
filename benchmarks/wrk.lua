-- Arguments after "--": method, and a file with the body. The last line of the output is JSON for load.py.
function init(args)
  wrk.method = args[1]
  if args[2] then
    wrk.body = io.open(args[2], "rb"):read("*a")
    wrk.headers["Content-Type"] = "application/json"
  end
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "microseconds": %d, "refused": %d, "broken": %d, "p50": %d, "p99": %d}\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
