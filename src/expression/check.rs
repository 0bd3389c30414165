//! The types of an expression: what may be put together with what. CEL itself finds out only when it evaluates.

use cel::common::ast::{
    CallExpr, ComprehensionExpr, Expr, IdedExpr, LiteralValue, SelectExpr, SourceInfo, operators,
};
use regex::{Regex, RegexBuilder};

use super::variables::{Moment, VARIABLES, pattern_name};
use super::{Fault, Gives, literal};

/// The most nodes of an expression.
const NODES_MAX: usize = 300;

/// The memory that a regular expression may take, compiled.
const PATTERN_BYTES_MAX: usize = 256 * 1024;

/// A type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Condition,
    Number,
    Text,
    /// Texts by name.
    Texts,
    /// A list of these.
    List(Item),
}

/// What a list holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Condition,
    Number,
    Text,
    /// Nothing is in it.
    None,
}

impl Kind {
    fn words(self) -> &'static str {
        match self {
            Self::Condition => "true or false",
            Self::Number => "a number",
            Self::Text => "text",
            Self::Texts => "texts by name",
            Self::List(_) => "a list",
        }
    }

    fn item(self) -> Option<Item> {
        match self {
            Self::Condition => Some(Item::Condition),
            Self::Number => Some(Item::Number),
            Self::Text => Some(Item::Text),
            Self::Texts | Self::List(_) => None,
        }
    }

    fn fits(self, other: Self) -> bool {
        let is_empty = |kind| matches!(kind, Self::List(Item::None));
        let are_lists = matches!((self, other), (Self::List(_), Self::List(_)));
        self == other || are_lists && (is_empty(self) || is_empty(other))
    }
}

impl Item {
    fn kind(self) -> Kind {
        match self {
            Self::Condition => Kind::Condition,
            Self::Number => Kind::Number,
            // Of none there is nothing to be wrong about.
            Self::Text | Self::None => Kind::Text,
        }
    }
}

/// Checks one expression.
pub(super) struct Checker<'a> {
    moment: Moment,
    places: &'a SourceInfo,
    /// Variables of the macros that we are in, innermost last.
    local: Vec<(String, Kind)>,
    patterns: Vec<Regex>,
    nodes: usize,
}

impl<'a> Checker<'a> {
    pub(super) fn new(moment: Moment, places: &'a SourceInfo) -> Self {
        Self { moment, places, local: Vec::new(), patterns: Vec::new(), nodes: 0 }
    }

    /// Checks the tree, and takes the regular expressions out of it; those.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(super) fn check(mut self, tree: &mut IdedExpr, gives: Gives) -> Result<Vec<Regex>, Fault> {
        let kind = self.kind(tree)?;
        match (gives, kind) {
            (Gives::Condition, Kind::Condition) | (Gives::Text, Kind::Text) => Ok(self.patterns),
            (Gives::Condition, _) => {
                Err(self.fault(tree, format!("is {}, not true or false", kind.words())))
            }
            (Gives::Text, Kind::Number | Kind::Condition) => Err(self.fault(
                tree,
                format!("is {}, not text; write string(...) around it", kind.words()),
            )),
            (Gives::Text, _) => Err(self.fault(tree, format!("is {}, not text", kind.words()))),
        }
    }

    fn fault(&self, node: &IdedExpr, message: impl Into<String>) -> Fault {
        // The parser's place of `a.b` is its dot.
        let mut first = node;
        while let Expr::Select(SelectExpr { operand, .. }) = &first.expr {
            first = operand;
        }
        let at = self.places.offset_for(first.id).map_or(0, |(start, _)| start as usize);
        Fault { message: message.into(), at }
    }

    fn kind(&mut self, node: &mut IdedExpr) -> Result<Kind, Fault> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(self.fault(node, "is too long"));
        }
        if let Some(name) = name(node)
            && !self.local.iter().any(|(known, _)| Some(&**known) == name.split('.').next())
            && let Some(kind) = self.variable(node, &name)?
        {
            return Ok(kind);
        }
        match &node.expr {
            Expr::Literal(value) => match value {
                LiteralValue::Boolean(_) => Ok(Kind::Condition),
                LiteralValue::Int(_) => Ok(Kind::Number),
                LiteralValue::String(_) => Ok(Kind::Text),
                LiteralValue::Double(_) | LiteralValue::UInt(_) => {
                    Err(self.fault(node, "numbers are whole here, and have no \"u\""))
                }
                LiteralValue::Null => {
                    Err(self.fault(node, "nothing is null here: what is not there is empty"))
                }
                LiteralValue::Bytes(_) => {
                    Err(self.fault(node, "there are no bytes here, only text"))
                }
            },
            Expr::Ident(name) => {
                let known = self.local.iter().rev().find(|(known, _)| known == name);
                known.map(|(_, kind)| *kind).ok_or_else(|| unknown(self, node))
            }
            Expr::Select(_) => self.selected(node),
            Expr::List(_) => self.list(node),
            Expr::Call(_) => self.call(node),
            Expr::Comprehension(_) => self.comprehension(node),
            Expr::Map(_) | Expr::Struct(_) => {
                Err(self.fault(node, "there are no maps here but headers and labels"))
            }
            Expr::Unspecified => Err(self.fault(node, "is nothing")),
        }
    }

    /// What a name of several parts stands for, as far as it is a variable.
    fn variable(&self, node: &IdedExpr, name: &str) -> Result<Option<Kind>, Fault> {
        let Some(known) = VARIABLES.iter().find(|known| known.name == name) else {
            return Ok(None);
        };
        if known.moment > self.moment {
            let message = format!("{name} is not known before the answer has come");
            return Err(self.fault(node, message));
        }
        if self.moment == Moment::End && name == "response.headers" {
            return Err(self.fault(node, "response.headers are not kept until the end"));
        }
        Ok(Some(known.kind))
    }

    /// A part of something: `key.labels.team`, or `has()` of it.
    fn selected(&mut self, node: &mut IdedExpr) -> Result<Kind, Fault> {
        let Expr::Select(SelectExpr { operand, field, test }) = &mut node.expr else {
            return Err(self.fault(node, "is nothing"));
        };
        let test = *test;
        let is_name = name(operand).is_some_and(|whole| {
            !VARIABLES.iter().any(|known| known.name == whole)
                && !self.local.iter().any(|(known, _)| *known == whole)
        });
        if is_name {
            return Err(unknown(self, node));
        }
        let kind = self.kind(operand)?;
        if kind != Kind::Texts {
            return Err(self.fault(node, format!("{} has no parts", kind.words())));
        }
        if !test {
            return Ok(Kind::Text);
        }
        // What is not there is empty text, and so would be taken for there.
        let name = IdedExpr {
            id: node.id,
            expr: Expr::Literal(LiteralValue::String(std::mem::take(field).into())),
        };
        let args = vec![name, std::mem::take(&mut **operand)];
        node.expr =
            Expr::Call(CallExpr { func_name: operators::IN.to_owned(), target: None, args });
        Ok(Kind::Condition)
    }

    fn list(&mut self, node: &mut IdedExpr) -> Result<Kind, Fault> {
        let Expr::List(list) = &mut node.expr else {
            return Err(self.fault(node, "is nothing"));
        };
        let mut all = Item::None;
        for element in &mut list.elements {
            let kind = self.kind(element)?;
            let Some(item) = kind.item() else {
                let message = format!("{} cannot be in a list", kind.words());
                return Err(self.fault(element, message));
            };
            if all != Item::None && all != item {
                return Err(self.fault(element, "a list holds things of one type"));
            }
            all = item;
        }
        Ok(Kind::List(all))
    }

    fn call(&mut self, node: &mut IdedExpr) -> Result<Kind, Fault> {
        let Expr::Call(CallExpr { func_name, target, args }) = &mut node.expr else {
            return Err(self.fault(node, "is nothing"));
        };
        let name = func_name.clone();
        if name == "matches" {
            return self.matches(node);
        }
        let mut kinds = Vec::new();
        for part in target.iter_mut().map(|target| &mut **target).chain(args) {
            kinds.push(self.kind(part)?);
        }
        let is_member = matches!(&node.expr, Expr::Call(call) if call.target.is_some());
        result_of(&name, is_member, &kinds).map_err(|message| self.fault(node, message))
    }

    /// `text.matches("pattern")`: the pattern is compiled now.
    fn matches(&mut self, node: &mut IdedExpr) -> Result<Kind, Fault> {
        let Expr::Call(CallExpr { target, args, .. }) = &mut node.expr else {
            return Err(self.fault(node, "is nothing"));
        };
        let (Some(text), [pattern]) = (target.as_deref_mut(), &mut args[..]) else {
            return Err(self.fault(node, "is written as text.matches(\"pattern\")"));
        };
        let kind = self.kind(text)?;
        if kind != Kind::Text {
            return Err(self.fault(text, format!("{} has no matches()", kind.words())));
        }
        let Some(written) = literal(pattern) else {
            return Err(
                self.fault(pattern, "the pattern of matches() is written as text in quotes")
            );
        };
        let compiled = RegexBuilder::new(written).size_limit(PATTERN_BYTES_MAX).build();
        let compiled = compiled.map_err(|error| {
            let error = error.to_string();
            let last = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
            self.fault(pattern, format!("not a regular expression: {last}"))
        })?;
        pattern.expr = Expr::Ident(pattern_name(self.patterns.len()));
        self.patterns.push(compiled);
        Ok(Kind::Condition)
    }

    /// A macro: `list.exists(x, x == "a")` and the like.
    fn comprehension(&mut self, node: &mut IdedExpr) -> Result<Kind, Fault> {
        let Expr::Comprehension(parts) = &mut node.expr else {
            return Err(self.fault(node, "is nothing"));
        };
        let ComprehensionExpr {
            iter_range,
            iter_var,
            iter_var2,
            accu_var,
            accu_init,
            loop_cond,
            loop_step,
            result,
        } = &mut **parts;
        let Kind::List(item) = self.kind(iter_range)? else {
            return Err(self.fault(iter_range, "only lists can be gone through"));
        };
        // One in another would cost the product of both.
        if !self.local.is_empty() || iter_var2.is_some() {
            return Err(self.fault(iter_range, "a list cannot be gone through within another"));
        }
        let accumulated = self.kind(accu_init)?;
        let of_list = (iter_var.clone(), item.kind());
        let of_result = (accu_var.clone(), accumulated);
        self.local.extend([of_list, of_result]);
        let condition = self.kind(loop_cond)?;
        let step = self.kind(loop_step)?;
        if condition != Kind::Condition || !step.fits(accumulated) {
            let message = format!("is {}, not {}", step.words(), accumulated.words());
            return Err(self.fault(loop_step, message));
        }
        if let (Some((_, known)), Kind::List(_)) = (self.local.last_mut(), step) {
            *known = step;
        }
        let result = self.kind(result)?;
        self.local.clear();
        Ok(result)
    }
}

/// What a function gives for things of these types.
fn result_of(name: &str, is_member: bool, kinds: &[Kind]) -> Result<Kind, String> {
    use Kind::{Condition, List, Number, Text, Texts};
    let found = match (name, is_member, kinds) {
        (operators::LOGICAL_AND | operators::LOGICAL_OR, false, [Condition, Condition])
        | (operators::LOGICAL_NOT | operators::NOT_STRICTLY_FALSE, false, [Condition])
        | ("contains" | "startsWith" | "endsWith", true, [Text, Text])
        | (operators::IN, false, [Text, Texts]) => Some(Condition),
        (operators::IN, false, [one, List(all)])
            if *all == Item::None || one.item() == Some(*all) =>
        {
            Some(Condition)
        }
        (operators::EQUALS | operators::NOT_EQUALS, false, [one, other])
            if one.fits(*other) && *one != Texts =>
        {
            Some(Condition)
        }
        (
            operators::LESS
            | operators::LESS_EQUALS
            | operators::GREATER
            | operators::GREATER_EQUALS,
            false,
            [Number, Number] | [Text, Text],
        ) => Some(Condition),
        (
            operators::ADD
            | operators::SUBSTRACT
            | operators::MULTIPLY
            | operators::DIVIDE
            | operators::MODULO,
            false,
            [Number, Number],
        )
        | (operators::NEGATE, false, [Number])
        | ("size", _, [Text | Texts | List(_)]) => Some(Number),
        (operators::ADD, false, [Text, Text])
        | (operators::INDEX, false, [Texts, Text])
        | ("lowerAscii", true, [Text])
        | ("string", false, [Text | Number | Condition]) => Some(Text),
        (operators::ADD, false, [List(one), List(other)]) if List(*one).fits(List(*other)) => {
            Some(List(if *one == Item::None { *other } else { *one }))
        }
        (operators::CONDITIONAL, false, [Condition, one, other]) if one.fits(*other) => {
            Some(if *one == List(Item::None) { *other } else { *one })
        }
        _ => None,
    };
    found.ok_or_else(|| misfit(name, is_member, kinds))
}

/// Why a function takes no such things.
fn misfit(name: &str, is_member: bool, kinds: &[Kind]) -> String {
    let words = |kind: &Kind| kind.words();
    if name == operators::CONDITIONAL && kinds.first() != Some(&Kind::Condition) {
        let first = kinds.first().map(words).unwrap_or_default();
        return format!("what stands before \"?\" is {first}, not true or false");
    }
    if name == operators::INDEX {
        return "headers and labels are taken by their names, as request.headers[\"x-team\"]"
            .into();
    }
    let sign = name.trim_matches(|letter: char| matches!(letter, '_' | '@')).replace('_', "");
    let is_sign = !name.starts_with(|letter: char| letter.is_ascii_alphabetic());
    match kinds {
        [one, other] if is_sign => {
            format!("{:?} cannot take {} and {}", sign, one.words(), other.words())
        }
        [one] if is_sign => format!("{sign:?} cannot take {}", one.words()),
        _ => {
            let known = ["contains", "startsWith", "endsWith", "lowerAscii", "size", "string"];
            if !known.contains(&name) {
                let known = known.join(", ");
                return format!("there is no function {name:?}; there are matches, {known}");
            }
            let taken: Vec<&str> = kinds.iter().map(words).collect();
            let around = if is_member { "of" } else { "for" };
            format!("there is no {name}() {around} {}", taken.join(" and "))
        }
    }
}

/// The dotted name that a node is, if it is one.
fn name(node: &IdedExpr) -> Option<String> {
    match &node.expr {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(SelectExpr { operand, field, test: false }) => {
            Some(format!("{}.{field}", name(operand)?))
        }
        _ => None,
    }
}

fn unknown(checker: &Checker<'_>, node: &IdedExpr) -> Fault {
    let written = name(node).unwrap_or_default();
    let nearest = VARIABLES
        .iter()
        .map(|known| (strsim::normalized_damerau_levenshtein(&written, known.name), known.name))
        .filter(|(similarity, _)| *similarity > 0.6)
        .max_by(|one, other| one.0.total_cmp(&other.0));
    let message = match nearest {
        Some((_, known)) => format!("there is no {written:?}, did you mean {known:?}?"),
        None => {
            let names: Vec<&str> = VARIABLES.iter().map(|known| known.name).collect();
            format!("there is no {written:?}; there are {}", names.join(", "))
        }
    };
    checker.fault(node, message)
}
