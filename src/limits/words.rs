//! What is said of a limit that does not allow an exchange.

use std::time::Duration;

use super::local::Exceeded;
use super::rule::Rule;
use crate::config::{Calendar, LimitSpec, MONEY_UNITS, Quantity, Tokens};
use crate::refusal::{LimitKind, Refusal};

/// What a client is told whose exchange a limit does not allow.
pub(super) fn refusal(
    rule: &Rule,
    currency: &str,
    (amount, max): (u64, u64),
    exceeded: Exceeded,
) -> Refusal {
    let LimitSpec { name, quantity, .. } = &rule.spec;
    let used = exceeded.standing.used;
    let (kind, what) = match quantity {
        Quantity::Requests(window) => {
            (LimitKind::Requests, format!("{max} requests in {}", seconds(*window)))
        }
        Quantity::Tokens(tokens, window) => {
            let which = match tokens {
                Tokens::Input => "input tokens",
                Tokens::Output => "output tokens",
                Tokens::Total => "tokens",
            };
            let text =
                format!("{max} {which} in {}, {used} used, {amount} asked for", seconds(*window));
            (LimitKind::Tokens, text)
        }
        Quantity::Concurrent => (LimitKind::Concurrent, format!("{max} requests at a time")),
        Quantity::Money(calendar) => {
            let time = match calendar {
                Calendar::Day => "day",
                Calendar::Month => "month",
            };
            let left = max.saturating_sub(used);
            let rest = if left == 0 {
                "is used up".to_owned()
            } else {
                let (left, asked) = (money(left), money(amount));
                format!("has {left} left, and this may cost {asked}: a lower max_tokens may fit")
            };
            (LimitKind::Budget, format!("{} {currency} a {time} {rest}", money(max)))
        }
    };
    Refusal::Limited { name: name.to_string(), kind, what, retry_after: exceeded.wait }
}

fn seconds(window: Duration) -> String {
    format!("{} s", window.as_secs_f64())
}

/// An amount in shares as one of money.
fn money(shares: u64) -> String {
    let (whole, part) = (shares / MONEY_UNITS, shares % MONEY_UNITS);
    let part = format!("{part:09}");
    let part = part.trim_end_matches('0');
    if part.is_empty() { whole.to_string() } else { format!("{whole}.{part}") }
}
