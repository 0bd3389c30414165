//! Conditions and values that the configuration computes: expressions in CEL, the Common Expression Language
//! (<https://github.com/google/cel-spec>).
//!
//! An expression is read and checked once, with the configuration: its names, the types of what it puts together,
//! its regular expressions. So there is little left that can go wrong when it is evaluated: a number may not fit.
//! What it may cost is bounded by its length, and by the lists that it may go through: headers, labels, and its own.

mod check;
mod variables;

use std::fmt;
use std::sync::{Arc, OnceLock};

use cel::common::ast::{Expr, IdedExpr};
use cel::common::types::{CelBool, CelString};
use cel::common::value::CowVal;
use cel::parser::Parser;
use cel::{Context, Env, Value};
use regex::Regex;

use check::Checker;
pub use variables::{AnswerFacts, Facts, Moment, Request, VARIABLES, Variable};

/// The longest expression, in bytes.
const BYTES_MAX: usize = 2000;

/// The deepest brackets in one. A parser of CEL takes ever more memory for each level.
const DEPTH_MAX: usize = 12;

/// The most signs in a row that may each be one of several things: the parser looks ahead through all of them.
const SIGNS_MAX: usize = 3;

/// What an expression is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gives {
    /// True or false.
    Condition,
    /// Text; numbers, and true and false, are written out.
    Text,
}

/// An expression that was checked.
#[derive(Clone)]
pub struct Expression {
    text: Arc<str>,
    tree: Arc<IdedExpr>,
    patterns: Arc<[Arc<Regex>]>,
}

/// What is wrong with an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// In words.
    pub message: String,
    /// Where, in characters from its beginning.
    pub at: usize,
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Expression {}

impl Expression {
    /// Reads an expression that is evaluated at this moment.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn read(text: &str, moment: Moment, gives: Gives) -> Result<Self, Fault> {
        check_shape(text)?;
        let parser = Parser::new().enable_optional_syntax(false).error_recovery_limit(1);
        let (mut tree, places) = parser.parse_with_source_info(text).map_err(|errors| {
            let error = errors.errors.first();
            let message = error.map_or_else(String::new, |error| in_words(&error.msg));
            // The parser counts columns from 1 or, at an end, from 0.
            let (line, column) = error.map_or((1, 0), |error| error.pos);
            Fault { message, at: position(text, line, column) }
        })?;
        let patterns = Checker::new(moment, &places).check(&mut tree, gives)?;
        Ok(Self {
            text: text.into(),
            tree: Arc::new(tree),
            patterns: patterns.into_iter().map(Arc::new).collect(),
        })
    }

    /// As it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether a condition holds.
    ///
    /// # Errors
    /// Why it cannot be told.
    pub fn holds(&self, facts: &Facts<'_>) -> Result<bool, String> {
        self.evaluate(facts, |value| value.downcast_ref::<CelBool>().map(|it| *it.inner()))
    }

    /// The text that it gives.
    ///
    /// # Errors
    /// Why it gives none.
    pub fn gives(&self, facts: &Facts<'_>) -> Result<String, String> {
        self.evaluate(facts, |value| {
            value.downcast_ref::<CelString<'_>>().map(|it| it.inner().to_owned())
        })
    }

    fn evaluate<T>(
        &self,
        facts: &Facts<'_>,
        read: impl for<'b, 'v> Fn(&CowVal<'b, 'v>) -> Option<T>,
    ) -> Result<T, String> {
        let resolver = variables::Resolver { facts, patterns: &self.patterns };
        let mut context = Context::with_env(Arc::clone(environment()));
        context.set_variable_resolver(&resolver);
        let value = Value::resolve_val(&self.tree, &context).map_err(|error| error.to_string())?;
        read(&value).ok_or_else(|| format!("it gives {}", value.get_type().name()))
    }
}

/// The functions that there are, made once.
fn environment() -> &'static Arc<Env> {
    static ENVIRONMENT: OnceLock<Arc<Env>> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let mut env = Env::stdlib();
        variables::declare(&mut env);
        Arc::new(env)
    })
}

/// Refuses what a parser of CEL would take too much time or memory for.
fn check_shape(text: &str) -> Result<(), Fault> {
    let fault = |message: String, at| Err(Fault { message, at });
    if text.trim().is_empty() {
        return fault("is empty".to_owned(), 0);
    }
    if text.len() > BYTES_MAX {
        return fault(format!("has more than {BYTES_MAX} bytes"), 0);
    }
    let (mut depth, mut signs, mut quote) = (0_usize, 0, None);
    let mut is_escaped = false;
    for (at, letter) in text.chars().enumerate() {
        if let Some(end) = quote {
            if letter == end && !is_escaped {
                quote = None;
            }
            is_escaped = letter == '\\' && !is_escaped;
            continue;
        }
        match letter {
            '"' | '\'' => quote = Some(letter),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        signs = if matches!(letter, '!' | '-') { signs + 1 } else { 0 };
        if depth > DEPTH_MAX {
            return fault(format!("has brackets more than {DEPTH_MAX} deep"), at);
        }
        if signs > SIGNS_MAX {
            return fault(format!("has more than {SIGNS_MAX} signs in a row"), at);
        }
    }
    Ok(())
}

/// What a parser says, in the words of a reader.
fn in_words(message: &str) -> String {
    let message = message.split(" expecting ").next().unwrap_or(message);
    match message.strip_prefix("Syntax error: ").unwrap_or(message) {
        text if text.contains("<EOF>") => "ends too early".to_owned(),
        text => text.to_owned(),
    }
}

/// The characters before a line and column.
fn position(text: &str, line: isize, column: isize) -> usize {
    let before = usize::try_from(line - 1).unwrap_or_default();
    let lines: usize =
        text.split_inclusive('\n').take(before).map(|line| line.chars().count()).sum();
    lines + usize::try_from(column - 1).unwrap_or_default()
}

/// Whether a node is the literal text.
fn literal(node: &IdedExpr) -> Option<&str> {
    match &node.expr {
        Expr::Literal(cel::common::ast::LiteralValue::String(text)) => Some(text.inner()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
