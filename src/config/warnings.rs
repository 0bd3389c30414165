//! What is allowed and should not stay so.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::clients::ClientKeys;
use super::limits::{LimitSpec, Quantity};
use super::snapshot::Snapshot;

/// A certificate that ends sooner is told of: tools renew theirs 30 days before.
const CERTIFICATE_LEFT_MIN: Duration = Duration::from_secs(14 * 86_400);

/// A line for each thing that an operator had better change.
#[must_use]
pub fn warnings(snapshot: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    for (service, model, pool) in snapshot.pools() {
        for backend in pool.backends.iter().filter(|backend| backend.url.tls) {
            if !backend.tls.verify {
                lines.push(format!(
                    "backend {} of {service}/{model}: tls.verify is false, so anybody on the way can \
                     pose as {}, read what is sent and take its key",
                    backend.id, backend.url.shown
                ));
            }
        }
    }
    clients(snapshot, &mut lines);
    if snapshot.tls.is_some()
        && !snapshot.listen.iter().chain(&snapshot.admin_listen).any(|it| it.tls)
    {
        lines.push("tls is not used: no listen address is an https one".to_owned());
    }
    let replay = snapshot.replay;
    if replay.body_bytes_max > replay.total_bytes_max {
        lines.push(
            "replay.body_bytes_max is larger than replay.total_bytes_max, which holds".to_owned(),
        );
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let certificates = snapshot.tls.iter().flat_map(|tls| tls.certificates.iter().enumerate());
    for (index, certificate) in certificates {
        let left = certificate.not_after.saturating_sub_unsigned(now.as_secs());
        let names = certificate.names.join(", ");
        if left <= 0 {
            lines.push(format!("tls.certificates[{index}] ({names}) has expired: renew it"));
        } else if left.unsigned_abs() < CERTIFICATE_LEFT_MIN.as_secs() {
            let days = left / 86_400;
            lines.push(format!("tls.certificates[{index}] ({names}) expires in {days} days"));
        }
    }
    lines
}

/// Keys that nobody has, and budgets that count nothing.
fn clients(snapshot: &Snapshot, lines: &mut Vec<String>) {
    let mut limits: Vec<&LimitSpec> = snapshot.limits.iter().collect();
    if let ClientKeys::Required(specs) = &snapshot.clients {
        if specs.keys.is_empty() && specs.issuers.is_empty() {
            lines.push("clients need a key, and there is none: `tollgate key new NAME`".to_owned());
        }
        limits.extend(specs.keys.iter().flat_map(|key| &key.limits));
        limits.extend(specs.issuers.iter().flat_map(|issuer| &issuer.grant.limits));
    }
    if !limits.iter().any(|limit| matches!(limit.quantity, Quantity::Money(_))) {
        return;
    }
    let has_price = snapshot
        .pools()
        .any(|(_, _, pool)| pool.backends.iter().any(|backend| backend.tariff.is_some()));
    if snapshot.prices.models.is_empty() && !has_price {
        lines.push("there are budgets and no prices: nothing counts against them".to_owned());
    }
    if snapshot.ledger.is_none() && snapshot.redis.is_none() {
        lines.push("there are budgets and no ledger: a restart forgets what was spent".to_owned());
    }
}
