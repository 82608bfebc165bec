# Random tables, random changes of type, random company: the rows against a
# truth that knows nothing of the extension.
#
# Each round makes up a table (columns, names, keys, storage, rows), a column of
# it and a change of its type, what hangs on that column, and two sessions that
# write all the while, under settings of their own; it migrates, disturbs that,
# and ends with rm_cleanup or rm_rollback, at random.  Whoever writes a row of the table writes, in the same
# transaction, its row of the ledger: the literal that the column was given, how
# often the row was updated, what else it holds.  In the end
#
#	every row of the table is one of the ledger, and the other way round; its
#	column holds what plain SQL makes of the literal; the table's own trigger
#	has counted the writers' updates and nobody else's;
#	what pg_dump says of the table, and of what is with it, is what it says of a
#	twin, made by the same commands, on which ALTER TABLE was run (or, when it
#	was taken back, was not);
#	that ALTER TABLE did to the twin what rm_advise had said of it;
#	indexes hold what the table holds, and nothing is left lying about.
#
# A reader with an old snapshot compares table and ledger meanwhile.  Writers may
# be refused what the table's constraints refuse, and nothing else.
#
# Without being told otherwise it runs the same rounds each time, so that whether
# a change passes is not decided by chance: only the timing differs.  New tables
# are found by RM_SEED=random (which says the seed it has taken), and by
# RM_ROUNDS=1000 RM_SEED=17, which runs rounds 17 to 1016.  A round that fails says
# its seed; RM_ROUNDS=1 and that seed repeat all but the timing.

use strict;
use warnings;

use File::Spec;
use IPC::Run;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $rounds = $ENV{RM_ROUNDS} || 12;
my $base_seed = $ENV{RM_SEED} // 1;
$base_seed = int(time) if $base_seed eq 'random';
die "RM_SEED is a number or \"random\", not \"$base_seed\"" if $base_seed !~ /^\d+$/;
diag "RM_SEED=$base_seed RM_ROUNDS=$rounds";

my $node = LabNode->new('generator');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
client_min_messages = warning
log_statement = none
fsync = off
autovacuum_naptime = 1s
max_worker_processes = 20
timezone = 'Europe/Berlin'
log_line_prefix = '%m [%p] %a '
risky_migrations.lock_timeout = 100
risky_migrations.lock_retries = 1000
risky_migrations.lock_retry_max_delay = 50
});
$node->start;
my $dir = PostgreSQL::Test::Utils::tempdir;

# ---------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------

sub chance { my ($p) = @_; return rand() < $p; }
sub pick { return $_[ int rand @_ ]; }
sub ident { my ($name) = @_; return '"' . $name =~ s/"/""/gr . '"'; }
sub literal { my ($text) = @_; return defined $text ? q{'} . $text =~ s/'/''/gr . q{'} : 'NULL'; }

# The changes of type.  value: the literal number k, another one for each k up to
# 20,000 where "unique"; bad: one that does not fit the new type; misfit: one that
# does not fit the old one.  Each literal means the same to both types.
#	text	both are text		number	both are numbers
#	plain	the value's text is the literal, in both types
#	sequence	the type of such a column that has a sequence of its own
#	cast	ALTER TABLE needs no USING for a default or a foreign key
my $stamp = sub { my ($k) = @_; my $s = $k * 61;
	return sprintf '2024-06-%02d %02d:%02d:%02d', 1 + $s / 86400, $s / 3600 % 24, $s / 60 % 60, $s % 60; };
my $day = sub { my ($k) = @_; return sprintf '%d-%02d-%02d', 1950 + $k / 336, 1 + $k / 28 % 12, 1 + $k % 28; };
my $word = sub { return "v$_[0]"; };
my $number = sub { return "$_[0]"; };
my $cents = sub { return sprintf '%d.%02d', $_[0] / 100, $_[0] % 100; };
my @moods = ('sad', 'so so', 'happy');
my $mood = sub { return $moods[ $_[0] % 3 ]; };
my @kinds = (
	{ old => 'int', new => 'bigint', value => $number, unique => 1, number => 1, plain => 1, cast => 1, key => 1, sequence => 'serial', misfit => '5000000000' },
	{ old => 'smallint', new => 'int', value => $number, unique => 1, number => 1, plain => 1, cast => 1, key => 1, sequence => 'smallserial', misfit => '70000' },
	{ old => 'bigint', new => 'int', value => $number, unique => 1, number => 1, plain => 1, cast => 1, key => 1, sequence => 'bigserial', bad => '5000000000' },
	{ old => 'int', new => 'numeric', value => $number, unique => 1, number => 1, plain => 1, cast => 1 },
	{ old => 'int', new => 'text', using => 'C::text', reverse => 'C::int', value => $number, unique => 1, plain => 1, cast => 1, misfit => 'many' },
	{ old => 'varchar(40)', new => 'text', value => $word, unique => 1, text => 1, plain => 1, cast => 1, key => 1 },
	{ old => 'varchar(40) COLLATE "C"', new => 'text', value => $word, unique => 1, text => 1, plain => 1, cast => 1 },
	{ old => 'text', new => 'varchar(60)', value => $word, unique => 1, text => 1, plain => 1, cast => 1, key => 1, bad => 'x' x 99 },
	{ old => 'text', new => 'varchar', value => $word, unique => 1, text => 1, plain => 1, cast => 1, long => 1 },
	{ old => 'varchar', new => 'text', value => $word, unique => 1, text => 1, plain => 1, cast => 1, long => 1 },
	{ old => 'char(20)', new => 'text', value => $word, unique => 1, plain => 1, cast => 1 },
	{ old => 'text', new => 'timestamp', using => 'C::timestamp', value => $stamp, unique => 1, plain => 1, bad => 'soon' },
	{ old => 'varchar(50)', new => 'timestamp', using => 'C::timestamp', value => $stamp, unique => 1, plain => 1, bad => 'soon' },
	{ old => 'timestamp', new => 'timestamptz', value => $stamp, unique => 1, cast => 1 },
	{ old => 'timestamptz', new => 'timestamp', value => $stamp, unique => 1, cast => 1 },
	{ old => 'date', new => 'timestamp', value => $day, unique => 1, cast => 1 },
	{ old => 'text', new => 'date', using => 'C::date', value => $day, unique => 1, plain => 1, bad => '2024-02-30' },
	{ old => 'numeric(10,2)', new => 'numeric(12,4)', value => $cents, unique => 1, number => 1, cast => 1, },
	{ old => 'text', new => 'int', using => 'C::int', value => $number, unique => 1, plain => 1, bad => 'x17' },
	{ old => 'text', new => 'numeric(12,2)', using => 'C::numeric', value => $cents, unique => 1, plain => 1, bad => '1,5' },
	{ old => 'mood', new => 'text', value => $mood, reverse => 'C::mood', plain => 1, cast => 1, misfit => 'angry' },
	{ old => 'text', new => 'mood', using => 'C::mood', value => $mood, plain => 1, bad => 'angry' },
	{ old => 'bool', new => 'int', using => 'C::int', reverse => 'C::bool', value => sub { $_[0] % 2 } },
	{ old => 'text', new => 'uuid', using => 'C::uuid', value => sub { sprintf '00000000-0000-4000-8000-%012x', $_[0] }, unique => 1, plain => 1, bad => '0' },
	{ old => 'text', new => 'jsonb', using => 'C::jsonb', value => sub { qq({"a": $_[0]}) }, unique => 1, plain => 1, bad => '{' },
	{ old => 'int[]', new => 'bigint[]', value => sub { "{$_[0],1,2}" }, unique => 1, plain => 1, cast => 1, misfit => '{5000000000}' },
	{ old => 'real', new => 'double precision', value => sub { "$_[0].5" }, unique => 1, number => 1, plain => 1, cast => 1 },
	{ old => 'time', new => 'interval', value => sub { sprintf '%02d:%02d:00', $_[0] / 60 % 24, $_[0] % 60 }, plain => 1, cast => 1 },
	{ old => 'bounded', new => 'bigint', value => $number, unique => 1, number => 1, plain => 1, cast => 1, misfit => '99999999' },
	{ old => 'text', new => 'label', value => $word, unique => 1, plain => 1, text => 1, cast => 1, long => 1 },
	{ old => 'date', new => 'text', using => 'C::text', reverse => 'C::date', value => $day, unique => 1, plain => 1, misfit => 'never' },
	{ old => 'timestamp', new => 'varchar(40)', using => 'C::text', reverse => 'C::timestamp', value => $stamp, unique => 1, plain => 1, misfit => 'never' },
	{ old => 'interval', new => 'text', using => 'C::text', reverse => 'C::interval', value => sub { sprintf '%d days %02d:%02d:00', 2 + $_[0] / 1440, $_[0] / 60 % 24, 1 + $_[0] % 59 }, plain => 1, misfit => 'never' },
	{ old => 'text', new => 'interval', using => 'C::interval', value => sub { sprintf '%d days %02d:%02d:00', 2 + $_[0] / 1440, $_[0] / 60 % 24, 1 + $_[0] % 59 }, plain => 1, bad => 'never' },
	{ old => 'int', new => 'bigint', using => 'CASE WHEN rid IS NOT NULL THEN C::bigint END', reverse => 'C::int', value => $number, unique => 1, number => 1, plain => 1, cast => 1, misfit => '5000000000' },
	{ old => 'text', new => 'int', using => q{CASE WHEN note IS NULL OR rid <> 0 THEN C::int END}, reverse => 'C::text', value => $number, unique => 1, plain => 1, bad => 'x17' },
	{ old => 'text', new => 'bytea', using => q{convert_to(C, 'UTF8')}, reverse => q{convert_from(C, 'UTF8')}, value => sub { "b$_[0]" }, unique => 1 },
);

# Columns that only stand around, with a value for the first rows
my @fillers = (
	[ 'int', '17' ], [ 'bigint', '1234567890123' ], [ 'text', q{'text'} ], [ 'varchar(30)', q{'it''s'} ],
	[ 'numeric', '1.50' ], [ 'timestamp', q{'2024-01-01 10:00:00'} ], [ 'timestamptz', q{'2024-01-01 10:00:00+00'} ],
	[ 'date', q{'2024-02-29'} ], [ 'uuid', q{'00000000-0000-4000-8000-000000000001'} ], [ 'jsonb', q{'{"a": [1, null]}'} ],
	[ 'int[]', q{'{1,NULL,3}'} ], [ 'text[]', q{'{a,"b c"}'} ], [ 'mood', q{'so so'} ], [ 'bounded', '5' ], [ 'bool', 'true' ],
	[ 'bytea', q{'\x00ff'} ], [ 'text', 'truth.long_text(3)' ], [ 'inet', q{'10.0.0.1/8'} ], [ 'char(7)', q{'abc'} ],
	[ 'text', 'NULL' ], [ 'double precision', q{'NaN'} ], [ 'int4range', q{'[1,5)'} ]);

# What some of them may become meanwhile, with the same text for each value
my %becomes = (
	'int' => 'bigint', 'bigint' => 'numeric', 'text' => 'varchar', 'varchar(30)' => 'text COLLATE "C"', 'numeric' => 'text', 'uuid' => 'text', 'jsonb' => 'text',
	'int[]' => 'bigint[]', 'mood' => 'text', 'bounded' => 'bigint', 'inet' => 'text', 'int4range' => 'text', 'double precision' => 'numeric');

# ---------------------------------------------------------------------------
# A table and what hangs on it
# ---------------------------------------------------------------------------

# The expression with the column's name in it, or NULL
sub expression
{
	my ($s, $text) = @_;
	return undef unless defined $text;
	return $text =~ s/\bC\b/$s->{c}/r;
}

# Makes up a round; every fourth is of a partitioned table.  All statements speak of the current schema; those of "late"
# are of things that forbid ALTER TABLE, and come after it on the twin.
sub make_up
{
	my ($parted, $parent) = @_;
	my $kind = pick(@kinds);
	my %s = (%$kind, kind => "$kind->{old} to $kind->{new}" . ($parted ? ', partitioned' : $parent ? ', with children' : ''),
		parted => $parted, parent => $parent);

	$s{table} = pick('item', 'item', 'Mixed Case', q{it's "odd"}, 't' x 63);
	$s{column} = pick('val', 'val', 'Some Value', 'user', 'c' x 63, q{o'"dd});
	$s{t} = ident($s{table});
	$s{c} = ident($s{column});
	$s{using_sql} = expression(\%s, $s{using});
	$s{reverse_sql} = expression(\%s, $s{reverse});
	$s{rows} = pick(0, 1, 30, 300, 300, 1000, 1500);
	$s{long} = $s{long} && chance(0.5);
	$s{unlogged} = chance(0.1) && !$parted;
	$s{key} = 0 unless $s{cast};
	$s{fk_from} = $s{key} && !$s{long} && chance(0.3);
	my $is_key = $s{unique} && !$s{long} && !$s{fk_from};
	$s{c_unique} = $is_key && chance(0.4);
	$s{not_null} = chance(0.4);
	$s{c_primary} = $s{c_unique} && chance(0.4);
	$s{not_null} ||= $s{c_primary};
	# what a child has not of its parent cannot be counted on, in all rows
	$s{sequence} = '' if $parent;
	$s{identity} = $s{sequence} && chance(0.3) && !$parted;
	$s{serial} = $s{sequence} && !$s{identity} && chance(0.4);
	$s{not_null} ||= $s{identity} || $s{serial};
	$s{fk_to} = $s{key} && $s{c_unique} && chance(0.6) && !$parted && !$parent;
	$s{counted} = chance(0.6) && !$parent;
	$s{garbage} = defined $s{bad} && !$s{long} && !$s{fk_from} && !$s{fk_to} && chance(0.6);
	$s{on_error} = $s{garbage} && !$s{not_null} && chance(0.5) ? 'null' : 'stop';

	make_table_sql(\%s);
	make_dependents_sql(\%s);
	return \%s;
}

sub make_table_sql
{
	my ($s) = @_;
	my @columns = ("rid int" . ($s->{c_primary} || chance(0.2) ? '' : pick(' PRIMARY KEY', ' PRIMARY KEY', ' NOT NULL UNIQUE', ' NOT NULL')));
	my $logged = $s->{unlogged} ? 'UNLOGGED ' : '';
	my $default = $s->{cast} && !$s->{identity} && !$s->{serial} && chance(0.3) ? ' DEFAULT ' . literal($s->{value}->(7)) : '';
	my @gone;

	$s->{upsert} = $columns[0] =~ /PRIMARY|UNIQUE/ && !$s->{parent};
	push @columns, "$s->{c} " . ($s->{serial} ? $s->{sequence} : $s->{old}) . ($s->{not_null} ? ' NOT NULL' : '')
	  . ($s->{identity} ? ' GENERATED BY DEFAULT AS IDENTITY' . pick('', ' (START 50 INCREMENT 7)') : '') . $default;
	push @columns, 'note text', $s->{counted} ? 'upd int DEFAULT 0' : ();
	foreach my $n (1 .. int rand 7)
	{
		my $filler = pick(@fillers);
		my $plain = pick("f$n", "F $n");
		my $name = ident($plain);
		push @columns, "$name $filler->[0]";
		push @{ $s->{fillers} }, [ $name, $filler->[1], $plain, $filler->[0] ];
	}
	foreach my $n (1 .. int rand 3)
	{
		push @columns, "gone$n " . pick('int', 'text NOT NULL DEFAULT 1', 'jsonb');
		push @gone, "ALTER TABLE $s->{t} DROP COLUMN gone$n";
	}
	# the column's place is a random one
	@columns = map { $_->[1] } sort { $a->[0] <=> $b->[0] } map { [ rand, $_ ] } @columns;
	push @{ $s->{base} }, "CREATE ${logged}TABLE peer (id $s->{old} PRIMARY KEY)" if $s->{fk_from};
	my $fillfactor = chance(0.3) ? ' WITH (fillfactor = ' . pick(50, 70, 90) . ')' : '';
	push @{ $s->{base} },
	  "CREATE ${logged}TABLE $s->{t} (" . join(', ', @columns) . ')' . ($s->{parted} ? ' PARTITION BY RANGE (rid)' : $fillfactor),
	  @gone;
	if ($s->{parted})
	{
		push @{ $s->{base} }, "CREATE TABLE part_low PARTITION OF $s->{t} FOR VALUES FROM (MINVALUE) TO (100)$fillfactor";
		push @{ $s->{base} }, "CREATE TABLE part_more PARTITION OF $s->{t} FOR VALUES FROM (100) TO (1000) PARTITION BY RANGE (rid)",
		  'CREATE TABLE part_mid PARTITION OF part_more FOR VALUES FROM (100) TO (500)', 'CREATE TABLE part_high PARTITION OF part_more DEFAULT'
		  if chance(0.5);
	}
	return;
}

sub make_dependents_sql
{
	my ($s) = @_;
	my ($t, $c) = ($s->{t}, $s->{c});
	my $logged = $s->{unlogged} ? 'UNLOGGED ' : '';
	my $base = $s->{base};
	my $late = $s->{late} = [];
	my $lost = $s->{lost} = [];

	if ($s->{c_unique})
	{
		push @$base, "ALTER TABLE $t ADD CONSTRAINT " . pick('once', '"Only Once"') . ' '
		  . ($s->{parted} ? ($s->{c_primary} ? "PRIMARY KEY ($c, rid)" : "UNIQUE ($c, rid)")
			: $s->{c_primary} ? pick("PRIMARY KEY ($c)", "PRIMARY KEY ($c)", "PRIMARY KEY (rid, $c)") : pick("UNIQUE ($c)", "UNIQUE NULLS NOT DISTINCT ($c, rid)", "UNIQUE ($c)") );
		# a foreign key needs the column alone
		$s->{fk_to} = 0 if $base->[-1] =~ /rid/;
	}
	# indexes
	if (!$s->{long})
	{
		push @$base, "CREATE INDEX ix_plain ON $t ($c)" if chance(0.4);
		push @$base, qq{CREATE INDEX "Ix Desc" ON $t ($c DESC NULLS LAST, rid) INCLUDE (note) WITH (fillfactor = 70)} if chance(0.3);
		push @$base, "CREATE UNIQUE INDEX ix_pair ON $t (rid, $c)" if chance(0.2);
		push @$base, "CREATE INDEX ix_cluster ON $t (rid, $c)", "ALTER TABLE $t CLUSTER ON ix_cluster" and $s->{cluster} = 1 if chance(0.2) && !$s->{parted};
		push @$base, "CREATE INDEX ix_lower ON $t (lower($c), rid)" if $s->{text} && chance(0.3);
		push @$base, "CREATE INDEX ix_null ON $t (($c IS NULL), rid DESC)" if chance(0.2);
		push @$base, "CREATE INDEX ix_two ON $t (($c + rid), $c)" if $s->{number} && chance(0.3);
		push @$base, "CREATE INDEX ix_two ON $t (($c || coalesce(note, '')))" if $s->{text} && chance(0.3);
		push @$base, "CREATE INDEX ix_abs ON $t (abs($c), ($c * 2))" if $s->{number} && chance(0.3);
	}
	push @$base, "CREATE INDEX ix_hash ON $t USING hash ($c)" if chance(0.2);
	push @$base, "CREATE INDEX ix_some ON $t (rid) WHERE $c IS NOT NULL" if chance(0.3);
	push @$base, "CREATE INDEX ix_other ON $t (note, rid)" if chance(0.3);
	# (ALTER TABLE gives the comment to the indexes of the partitions too)
	push @$base, "COMMENT ON INDEX $1 IS 'an index'" if chance(0.3) && !$s->{parted} && "@$base" =~ /CREATE INDEX (ix_\w+)/;
	# constraints
	push @$base, qq{ALTER TABLE $t ADD CONSTRAINT "ck some" CHECK ($c IS NOT NULL OR rid IS NOT NULL)} if chance(0.3);
	push @$base, "ALTER TABLE $t ADD CONSTRAINT ck_range CHECK ($c > -1000)" . pick('', ' NOT VALID') if $s->{number} && chance(0.4);
	push @$base, "ALTER TABLE $t ADD CONSTRAINT ck_two CHECK ($c + rid > -1000 OR note = 'first')" if $s->{number} && chance(0.3);
	push @$base, "ALTER TABLE $t ADD CHECK (length($c) < 100000)" if $s->{text} && chance(0.3);
	push @$base, "ALTER TABLE $t ADD CONSTRAINT fk_peer FOREIGN KEY ($c) REFERENCES peer"
	  . pick('', ' ON DELETE CASCADE', ' ON UPDATE CASCADE', ' DEFERRABLE INITIALLY DEFERRED', $s->{parted} ? '' : ' NOT VALID')
	  if $s->{fk_from};
	push @$base, "CREATE ${logged}TABLE child (n int, ref $s->{old})",
	  "ALTER TABLE child ADD CONSTRAINT \"fk of child\" FOREIGN KEY (ref) REFERENCES $t ($c)"
	  . pick(' ON DELETE SET NULL ON UPDATE CASCADE', ' ON DELETE CASCADE ON UPDATE CASCADE DEFERRABLE', '')
	  if $s->{fk_to};
	# what the column itself has
	push @$base, "COMMENT ON COLUMN $t.$c IS 'what it''s for'" if chance(0.3);
	push @$base, "GRANT SELECT ($c), UPDATE ($c, rid) ON $t TO reader" if chance(0.3);
	push @$base, "ALTER TABLE $t ALTER $c SET STATISTICS " . pick(0, 50, 500) if chance(0.2);
	push @$base, "ALTER TABLE $t ALTER $c SET (n_distinct = -0.3)" if chance(0.1);
	push @$base, "CREATE STATISTICS st (" . pick('ndistinct', 'dependencies', 'mcv, ndistinct') . ") ON $c, rid FROM $t" if chance(0.2);
	if ($s->{long} && chance(0.5))
	{
		# ALTER TABLE gives the column its type's own storage
		push @$base, "ALTER TABLE $t ALTER $c SET STORAGE EXTERNAL";
		push @$lost, $base->[-1];
	}
	push @$base, "CREATE TABLE part_rest PARTITION OF $t DEFAULT" if $s->{parted};
	push @$base, "CREATE ${logged}TABLE kid (own text DEFAULT 'its own', PRIMARY KEY (rid)) INHERITS ($t)", "CREATE INDEX ix_kid ON kid (note, rid) WHERE $c IS NOT NULL",
	  "CREATE ${logged}TABLE grandkid (UNIQUE (rid)) INHERITS (kid)"
	  if $s->{parent};
	# what ALTER TABLE refuses to take along
	if ($s->{counted})
	{
		push @$late, q{CREATE FUNCTION count_update() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.upd = coalesce(NEW.upd, 0) + 1; RETURN NEW; END'},
		  "CREATE TRIGGER counted BEFORE UPDATE ON $t FOR EACH ROW EXECUTE FUNCTION count_update()";
	}
	# (a comparison of a domain's values is one of its base type's, whose cast does
	# not fit the new type: that is refused)
	if (chance(0.2) && $s->{old} ne 'bounded')
	{
		push @$late, q{CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'},
		  "CREATE TRIGGER of_column AFTER UPDATE OF $c ON $t FOR EACH ROW WHEN (old.$c IS DISTINCT FROM new.$c) EXECUTE FUNCTION nothing()";
	}
	push @$late, "CREATE VIEW v_one AS SELECT rid, $c, note FROM $t WHERE $c IS NOT NULL" if chance(0.3);
	push @$late, "CREATE VIEW v_two WITH (security_barrier) AS SELECT $c AS again, count(*) AS n FROM v_one GROUP BY $c",
	  'GRANT SELECT ON v_two TO reader', q{COMMENT ON VIEW v_two IS 'counts'}
	  if "@$late" =~ /v_one/ && chance(0.5);
	push @$late, "CREATE VIEW v_all AS SELECT * FROM $t" if chance(0.15);
	push @$late, "ALTER TABLE $t ENABLE ROW LEVEL SECURITY", "CREATE POLICY some_rows ON $t USING ($c IS NOT NULL) WITH CHECK (rid > 0)",
	  chance(0.3) ? "ALTER TABLE $t FORCE ROW LEVEL SECURITY" : ()
	  if chance(0.2);
	$s->{late_index} = "CREATE INDEX ix_late ON $t (rid) WHERE $c IS NOT NULL";
	return;
}

# ---------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------

sub sql
{
	my ($query) = @_;
	return $node->safe_psql('postgres', $query);
}

# Starts psql with that name for these statements, each a command of its own, or
# for a file of them.
sub start_psql
{
	my ($name, $user, @arguments) = @_;
	my %session = (out => '', err => '');
	local $ENV{PGAPPNAME} = $name;
	$session{handle} = IPC::Run::start(
		[ 'psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $node->connstr('postgres') . " user=$user", @arguments ],
		'<', File::Spec->devnull, '>', \$session{out}, '2>', \$session{err},
		IPC::Run::timeout(2 * $PostgreSQL::Test::Utils::timeout_default));
	return \%session;
}

# Starts one statement as the table's owner, in a session of its own.
sub start_statement
{
	my ($s, $statement) = @_;
	return start_psql('migration', 'keeper', '-v', 'ON_ERROR_STOP=1',
		map { ('-c', $_) } 'SET search_path = gen, public', @{ $s->{settings} }, $statement);
}

# Waits for its end; returns nothing, or what it complained of.
sub finish
{
	my ($session) = @_;
	my $ok = eval { $session->{handle}->finish; 1 };
	return $@ unless $ok;
	return $session->{handle}->result(0) ? $session->{err} || 'no message' : '';
}

# ---------------------------------------------------------------------------
# Writers
# ---------------------------------------------------------------------------

# What a writer's session may have set: all is converted as if it had not.  The
# literals mean the same to each of these, but for a time zone's.
my @usual_settings = (q{DateStyle = 'ISO, MDY'}, q{IntervalStyle = 'postgres'}, q{TimeZone = 'Europe/Berlin'}, 'extra_float_digits = 1');

sub other_settings
{
	my ($s) = @_;
	my @settings = (q{DateStyle = '} . pick('ISO, MDY', 'SQL, DMY', 'German', 'Postgres, MDY') . q{'},
		'IntervalStyle = ' . pick(qw(postgres sql_standard iso_8601 postgres_verbose)), 'extra_float_digits = ' . pick(-3, 1));
	push @settings, q{TimeZone = '} . pick('UTC', 'America/New_York', 'Asia/Kolkata') . q{'} if $s->{kind} !~ /timestamptz/;
	return \@settings;
}

# A value: literal or expression, and whether it will not convert
sub value
{
	my ($s, $garbage) = @_;
	return ('NULL', 'false') if !$s->{not_null} && chance(0.1);
	return (literal($s->{bad}), 'true') if $garbage && $s->{garbage} && chance(0.1);
	return ('truth.long_text(' . int(rand 1000) . ')', 'false') if $s->{long} && chance(0.3);
	return (literal($s->{value}->(int rand($s->{fk_from} ? 50 : 20000))), 'false');
}

# With on_error => 'null' a bad value is NULL after the swap, and still in the old
# column.  A NULL that is written over that NULL is no change that a trigger could
# see, so on the way back the bad value is there again.
sub back_from_null
{
	my ($s) = @_;
	return '' if $s->{on_error} ne 'null';
	return " AND NOT (l.truth IS NULL AND t.$s->{c}::text = " . literal($s->{bad}) . ')';
}

# Whoever writes a row of the table and of the ledger in two statements must not
# meet, between them, one who makes that row; where rows are made that others
# know of, the ones share a lock and the other has it alone.
my $sharing = q{DO $$BEGIN PERFORM pg_advisory_xact_lock_shared(1); END$$;} . "\n";
my $alone = q{DO $$BEGIN PERFORM pg_advisory_xact_lock(1); END$$;} . "\n";

# One transaction of a writer
sub transaction
{
	my ($s, $writer, $n) = @_;
	my ($t, $c) = ($s->{t}, $s->{c});
	my $rid = chance(0.9) ? 1 + int rand($s->{rows} + 1) : 1_000_000 * $writer + int rand($n + 1);
	my ($v, $bad) = value($s, $n < 200);
	my $change = "UPDATE truth.ledger SET truth = $v, bad = $bad, upd = upd + 1 WHERE rid = $rid;\nUPDATE $t SET $c = $v WHERE rid = $rid;\n";
	my $new = 1_000_000 * $writer + $n;
	my $insert = "INSERT INTO truth.ledger (rid, truth, bad, note) VALUES ($new, $v, $bad, 'new');\n"
	  . "INSERT INTO $t (rid, $c, note) VALUES ($new, $v, 'new');\n";
	my $note = "UPDATE truth.ledger SET note = 'n$n', upd = upd + 1 WHERE rid = $rid;\nUPDATE $t SET note = 'n$n' WHERE rid = $rid;\n";
	my $what = rand 100;
	my $begin = "BEGIN;\n" . ($s->{upsert} ? $sharing : '');

	return "$begin${change}COMMIT;\n" if $what < 38;
	return "$begin${note}COMMIT;\n" if $what < 53;
	return "$begin${insert}COMMIT;\n" if $what < 66;
	return "${begin}DELETE FROM truth.ledger WHERE rid = $rid;\nDELETE FROM $t WHERE rid = $rid;\nCOMMIT;\n" if $what < 70;
	return "$begin${change}ROLLBACK;\n" if $what < 73;
	return "$begin${note}SAVEPOINT a;\n${insert}ROLLBACK TO a;\nCOMMIT;\n" if $what < 76;
	return "BEGIN ISOLATION LEVEL " . pick('REPEATABLE READ', 'SERIALIZABLE') . ";\n${change}COMMIT;\n" if $what < 79;
	return "$begin${change}SELECT pg_sleep(0.05);\n${insert}COMMIT;\n" if $what < 80;
	if ($what < 85)
	{
		my $low = 1 + int rand($s->{rows} + 1);
		my $some = "BETWEEN $low AND $low + " . int rand 40;
		return "${begin}SELECT FROM (SELECT FROM truth.ledger WHERE rid $some ORDER BY rid FOR UPDATE) l HAVING false;\n"
		  . "UPDATE truth.ledger SET note = 'm$n', upd = upd + 1 WHERE rid $some;\nUPDATE $t SET note = 'm$n' WHERE rid $some;\nCOMMIT;\n";
	}
	# where the key is in the way the row comes to nothing, or to an update
	return "BEGIN;\n${alone}WITH i AS (INSERT INTO $t (rid, $c, note) VALUES (" . pick($new, $rid) . ", $v, 'new') ON CONFLICT DO NOTHING RETURNING rid)\n"
	  . "INSERT INTO truth.ledger (rid, truth, bad, note) SELECT rid, $v, $bad, 'new' FROM i;\nCOMMIT;\n"
	  if $what < 88 && $s->{upsert} || $what < 86 && $s->{upsert};
	return "${begin}UPDATE truth.ledger SET truth = $v, bad = $bad, upd = upd + 1 WHERE rid = $rid;\n"
	  . "INSERT INTO $t (rid, $c) SELECT rid, $v FROM truth.ledger WHERE rid = $rid ON CONFLICT (rid) DO UPDATE SET $c = excluded.$c;\nCOMMIT;\n"
	  if $what < 91 && $s->{upsert};
	# it sees both tables as they were, whatever happens meanwhile
	return "BEGIN ISOLATION LEVEL REPEATABLE READ;\n" . join('', map { "SET LOCAL $_;\n" } @usual_settings)
	  . "SELECT 1 HAVING false;\nSELECT pg_sleep(" . pick(0, 0.02, 0.2) . ");\n"
	  . "SELECT 'WRONG in a snapshot: ' || count(*) FROM truth.ledger l FULL JOIN $t t USING (rid)\n"
	  . "WHERE (l.rid IS NULL OR t.rid IS NULL OR NOT l.bad AND t.$c\::text IS DISTINCT FROM l.truth)\n"
	  . "AND (t.rid > 0) IS NOT FALSE" . back_from_null($s) . " HAVING count(*) > 0;\nCOMMIT;\n"
	  if $what < 94 && $s->{plain};
	return "INSERT INTO child (n, ref) SELECT $n, $c FROM $t WHERE rid = $rid;\n" if $what < 97 && $s->{fk_to};
	return "VACUUM $t;\n" if $what < 98;
	return "VACUUM FULL $t;\n" if $what < 98.3;
	return "CLUSTER $t;\n" if $what < 98.6 && $s->{cluster};
	return "ANALYZE $t;\n" if $what < 99;
	return "$begin${change}COMMIT;\n";
}

sub start_writers
{
	my ($s) = @_;
	my @writers;
	foreach my $writer (1 .. $s->{writers})
	{
		my $file = "$dir/writer$writer.sql";
		my $text = "SET search_path = gen, public;\n" . join '', map { "SET $_;\n" } @{ $s->{writer_settings}[ $writer - 1 ] };
		$text .= transaction($s, $writer, $_) . 'SELECT pg_sleep(' . pick(0, 0, 0.002, 0.01) . ");\n" for 1 .. 1500;
		unlink $file;
		PostgreSQL::Test::Utils::append_to_file($file, $text);
		push @writers, start_psql("writer$writer", sql('SELECT current_user'), '-o', "$dir/out$writer", '-f', $file);
	}
	return @writers;
}

# What a writer may be told: by the constraints of the table, of the value that
# the new type does not take, of its old snapshot, and that it was ended.
my %fair = map { $_ => 1 } qw(23505 23503 23514 23502 22P02 22007 22008 22003 22001 40001 25P02 57P01);

sub stop_writers
{
	my (@writers) = @_;
	my @unfair;
	sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'writer%'});
	foreach my $n (1 .. @writers)
	{
		finish($writers[ $n - 1 ]);
		foreach (split /^(?=psql:)/m, $writers[ $n - 1 ]{err})
		{
			push @unfair, $_ if /(?:ERROR|FATAL|PANIC):  (\w{5}):/ && !$fair{$1};
		}
		push @unfair, slurp_file("$dir/out$n") =~ /^(WRONG.*)$/mg;
	}
	return join '', @unfair;
}

# ---------------------------------------------------------------------------
# A round
# ---------------------------------------------------------------------------

# Both schemas, the ledger, and the first rows
sub set_up
{
	my ($s) = @_;
	my (@rows, @ledger);
	my $types = join '', map { "$_;\n" } q{CREATE TYPE mood AS ENUM ('sad', 'so so', 'happy')},
	  'CREATE DOMAIN bounded AS int CHECK (VALUE < 1000000)', 'CREATE DOMAIN label AS text';
	my $text = '';

	$text .= "CREATE SCHEMA $_ AUTHORIZATION keeper; GRANT USAGE ON SCHEMA $_ TO reader;\n" for 'gen', 'tw';
	$text .= "SET ROLE keeper;\n";
	$text .= "SET search_path = $_, public;\n$types" . join('', map { "$_;\n" } @{ $s->{base} }) for 'tw', 'gen';
	$text .= join('', map { "$_;\n" } @{ $s->{late} });
	$text .= "RESET ROLE;\nCREATE TABLE truth.ledger (rid int PRIMARY KEY, truth text, bad bool NOT NULL, note text, upd int NOT NULL DEFAULT 0, fill text);\n";
	$text .= 'INSERT INTO peer VALUES ' . join(', ', map { '(' . literal($s->{value}->($_)) . ')' } 0 .. 49) . ";\n" if $s->{fk_from};
	my @names = map { $_->[0] } @{ $s->{fillers} // [] };
	my $fill = join '', map { ", $_->[1]" } @{ $s->{fillers} // [] };
	foreach my $rid (1 .. $s->{rows})
	{
		my ($v, $bad) = value($s, 1);
		# a key has each value but once, and no two bad ones
		($v, $bad) = (literal($s->{value}->($rid)), 'false') if $s->{c_unique} && $v ne 'NULL';
		push @rows, "($rid, $v, 'first'$fill)";
		push @ledger, "($rid, $v, $bad, 'first')";
	}
	if (@rows)
	{
		my $columns = '(' . join(', ', 'rid', $s->{c}, 'note', @names) . ') VALUES ';
		if ($s->{parent})
		{
			my $third = int(@rows / 3);
			foreach my $child ('kid', 'grandkid')
			{
				my @some = splice @rows, 0, $third;
				$text .= "INSERT INTO $child $columns" . join(",\n", @some) . ";\n" if @some;
			}
		}
		$text .= "INSERT INTO $s->{t} $columns" . join(",\n", @rows) . ";\n";
		$text .= 'INSERT INTO truth.ledger VALUES ' . join(",\n", @ledger) . ";\n";
		$text .= "UPDATE truth.ledger l SET fill = (SELECT md5(ROW(" . join(', ', map { "t.$_" } @names) . ")::text) FROM $s->{t} t WHERE t.rid = l.rid);\n"
		  if @names;
		$text .= "INSERT INTO child SELECT rid, $s->{c} FROM $s->{t} WHERE rid % 3 = 0;\n" if $s->{fk_to};
	}
	$text .= "VACUUM ANALYZE $s->{t};\n" if chance(0.5);
	my $err = '';
	$node->psql('postgres', $text, stderr => \$err, on_error_stop => 1) == 0 or die "set up: $err";
	return;
}

sub tear_down
{
	sql('DROP SCHEMA IF EXISTS gen, tw CASCADE; DROP TABLE IF EXISTS truth.ledger');
	return;
}

# state, whether somebody runs it, what to call next, and what it complained of
sub look
{
	my ($s) = @_;
	return split /\|/, sql(qq{
SELECT m.state, m.running_pid IS NOT NULL, coalesce(m.next_call, ''), m.steps_done, coalesce(m.run_state, ''),
	coalesce(m.sqlstate || ': ' || replace(m.message, '|', '/'), ''), coalesce(m.last_direction, '')
FROM rm_migrations m WHERE m.id = $s->{id}}), -1;
}

# Columns that change with it, by rm_alter_types(): name and type
sub further_columns
{
	my ($s) = @_;
	my @columns = map { [ $_->[2], $becomes{ $_->[3] } ] } grep { $becomes{ $_->[3] } && chance(0.5) } @{ $s->{fillers} // [] };
	push @columns, [ 'note', 'varchar(90)' ] if chance(0.3) && !$s->{text};
	push @columns, [ 'rid', 'bigint' ] if chance(0.4) && !$s->{parted} && !$s->{parent};
	return @columns;
}

# What ALTER TABLE has to be told
sub alter_clauses
{
	my ($s) = @_;
	return join ', ', "ALTER COLUMN $s->{c} TYPE $s->{new}" . ($s->{using} ? " USING $s->{using_sql}" : ''),
	  map { 'ALTER COLUMN ' . ident($_->[0]) . " TYPE $_->[1] USING " . ident($_->[0]) . '::' . $_->[1] } @{ $s->{further} };
}

# The same as an SQL expression for rm_alter_types()
sub changes
{
	my ($s) = @_;
	my $change = sub {
		my ($column, $type, $using) = @_;
		return literal($column) . ', ' . (defined $using ? "jsonb_build_object('type', " . literal($type) . ", 'using', " . literal($using) . ')' : 'to_jsonb(' . literal($type) . '::text)');
	};
	return 'jsonb_build_object(' . join(', ', $change->($s->{column}, $s->{new}, $s->{using_sql}),
		map { $change->($_->[0], $_->[1], ident($_->[0]) . '::' . $_->[1]) } @{ $s->{further} }) . ')';
}

# Nothing of the migration is to be done any more once the column has its new type.
sub rewrites { my ($s) = @_; return $s->{method} eq 'online_rewrite'; }

sub wait_until_idle
{
	my ($s) = @_;
	my $until = time + $PostgreSQL::Test::Utils::timeout_default;
	while (time < $until)
	{
		my (undef, $running, undef, undef, $run_state) = look($s);
		return 1 if $running ne 't';
		sql("SELECT rm_resume($s->{id})") if $run_state eq 'paused';
		usleep(20_000);
	}
	die "migration $s->{id} does not come to an end";
}

# Rows whose value does not convert get one that does.
my $mended = 20_001;
sub mend
{
	my ($s) = @_;
	my $text = '';
	foreach my $rid (split /\n/, sql('SELECT rid FROM truth.ledger WHERE bad'))
	{
		my $v = literal($s->{value}->($s->{fk_from} ? 1 : $mended++));
		$text .= "BEGIN; $sharing UPDATE truth.ledger SET truth = $v, bad = false, upd = upd + 1 WHERE rid = $rid;\n"
		  . "UPDATE gen.$s->{t} SET $s->{c} = $v WHERE rid = $rid; COMMIT;\n";
		$mended = 20_001 if $mended > 29_000;
	}
	sql($text) if $text;
	return;
}

# Something befalls the migration.
sub disturb
{
	my ($s) = @_;
	my $what = pick('cancel', 'terminate', 'pause', 'rm_cancel', 'index', 'nothing');
	my $runner = "(SELECT running_pid FROM rm_migrations WHERE id = $s->{id})";

	push @{ $s->{story} }, $what;
	sql("SELECT pg_cancel_backend($runner)") if $what eq 'cancel';
	sql("SELECT pg_terminate_backend($runner)") if $what eq 'terminate';
	if ($what eq 'pause' || $what eq 'rm_cancel')
	{
		my ($state) = look($s);
		return unless $state eq 'open';
		my $err = '';
		$node->psql('postgres', $what eq 'pause' ? "SELECT rm_pause($s->{id})" : "SELECT rm_cancel($s->{id})", stderr => \$err);
		usleep(rand 100_000);
		# it may have come to its end before, or have been cancelled
		die $err if $err && $err !~ /ERROR:  migration \d+ is /;
		$node->psql('postgres', "SELECT rm_resume($s->{id})", stderr => \$err) if $what eq 'pause';
	}
	if ($what eq 'index' && !$s->{has_late_index})
	{
		$s->{has_late_index} = 1;
		sql("SET ROLE keeper; SET search_path = gen; $s->{late_index}");
	}
	return;
}

# Goes on by what the view says until the swap is done, or what was said is.
# Returns nothing, or what is amiss.
sub go_on
{
	my ($s, $until, $statement) = @_;
	my @said;
	for (1 .. 40)
	{
		wait_until_idle($s);
		my ($state, undef, $next, $steps, $run_state, $error) = look($s);
		return '' if $state eq $until || $until eq 'swapped' && $steps == 5;
		if ($state eq 'rolled back' && $until ne 'rolled back' && grep { /cancel|terminate/ } @{ $s->{story} })
		{
			# broken off before its first step was done, it has given up
			$s->{end} = 'rollback';
			push @{ $s->{story} }, 'given up';
			return '';
		}
		return "is $state rather than $until" if $state ne 'open';
		mend($s) if $error =~ /no new value|does not convert|do not convert/;
		my $call = start_statement($s, $statement // $next);
		if (chance(0.15) && @said < 20)
		{
			usleep(rand 150_000);
			disturb($s) unless $statement && chance(0.5);
		}
		my $err = finish($call);
		push @said, ($statement // $next) . ": $err" if $err;
		# of what was done to it; of rows that are mended next time
		next if $err eq '' || $err =~ /57014|57P01|server closed the connection|terminating|55006|55P03|no new value|is paused/;
		if ($err =~ /added to the new column since the swap/)
		{
			sql('DROP INDEX gen.ix_late');
			$s->{has_late_index} = 0;
			next;
		}
		return "$s->{kind}: $said[-1]";
	}
	return "no end: @said";
}

# Starts the migration one way or another; false with the reason if it does not.
sub begin
{
	my ($s) = @_;
	my $last = sql('SELECT coalesce(max(id), 0) FROM risky_migrations.migration');
	my $tablename = literal("gen.$s->{t}");
	my @arguments = ($tablename, literal($s->{column}), literal($s->{new}), literal($s->{using_sql}));
	my $way = $s->{on_error} eq 'null' || rewrites($s) ? pick('call', 'start') : pick('call', 'start', 'steps');

	push @{ $s->{story} }, $way, map { "$_->[0] too" } @{ $s->{further} };
	my $head = join(', ', @arguments);
	my $tail = join ', ', rewrites($s) ? () : 'reverse_expr => ' . literal($s->{reverse_sql}),
	  "method => '$s->{method}'", @{ $s->{further} } ? () : "on_error => '$s->{on_error}'", 'batch => ' . pick(1, 50, 1000, 100000);
	$head = "$tablename, " . changes($s) if @{ $s->{further} };
	$s->{call} = start_statement($s,
		$way eq 'call' && @{ $s->{further} } ? "CALL rm_alter_types($head, $tail)"
		: $way eq 'call' ? "CALL rm_alter_type($head, $tail)"
		: $way eq 'start' ? "SELECT rm_start($head, $tail)"
		: "CALL rm_add_column($head, " . literal($s->{reverse_sql}) . ')');
	my $until = time + $PostgreSQL::Test::Utils::timeout_default;
	while (time < $until)
	{
		$s->{id} = sql("SELECT max(id) FROM risky_migrations.migration WHERE id > $last");
		return '' if $s->{id};
		$s->{call}{handle}->pump_nb;
		if (!$s->{call}{handle}->pumpable)
		{
			my $err = finish($s->{call});
			$s->{id} = sql("SELECT max(id) FROM risky_migrations.migration WHERE id > $last");
			return $s->{id} ? '' : "refused: $err";
		}
		usleep(10_000);
	}
	return 'does not begin';
}

sub dump_of
{
	my ($schema) = @_;
	my ($out, $err);
	IPC::Run::run([ 'pg_dump', '-s', '-n', $schema, '-d', $node->connstr('postgres') ], '>', \$out, '2>', \$err) or die $err;
	$out =~ s/^\\(?:un)?restrict .*\n//mg;
	$out =~ s/\btw\b/gen/g;
	return $out;
}

# The same without what only tells the order of columns
sub without_order
{
	my ($dump) = @_;
	my @lines = grep { /\S/ && !/^--/ } split /\n/, $dump;
	s/,$// for @lines;
	s/^(CREATE STATISTICS .* ON )(.*)( FROM .*)$/$1 . join(', ', sort split m{, }, $2) . $3/e for @lines;
	return join "\n", sort @lines;
}

# What differs, line by line
sub difference
{
	my ($is, $should) = @_;
	my (%is, %should);
	$is{$_}++ for split /\n/, $is;
	$should{$_}++ for split /\n/, $should;
	return join "\n", (map { "+ $_" } grep { ($is{$_} // 0) > ($should{$_} // 0) } sort keys %is),
	  (map { "- $_" } grep { ($should{$_} // 0) > ($is{$_} // 0) } sort keys %should), '(or their order)';
}

# Runs ALTER TABLE on the twin: does it what rm_advise says that it would?
sub check_advice
{
	my ($s) = @_;
	my $path = 'SET search_path = tw, public';
	my $alter = "ALTER TABLE $s->{t} " . alter_clauses($s);
	if ($s->{parted} || $s->{parent} || @{ $s->{further} })
	{
		# what is read and written of which partition or child is too much to count here, and
		# advice is of one column
		sql("SET ROLE keeper; $path; $alter");
		return '';
	}
	my $arguments = join ', ', map { literal($_) } $s->{t}, $s->{column}, $s->{new}, $s->{using_sql};
	my @read = map { "coalesce(bool_or(split_part(x, ': ', 1) = format('tw.%I', " . literal($_) . ')), false)' } $s->{table}, 'child';
	my $advice = sql("$path; SELECT rewrites, (SELECT count(*) FROM unnest(indexes_rebuilt)), (SELECT string_agg(x, ', ' ORDER BY x COLLATE \"C\") FROM unnest(indexes_rebuilt) x),"
		  . " (SELECT $read[0] FROM unnest(scans) x), (SELECT $read[1] FROM unnest(scans) x) FROM rm_advise($arguments)");
	my $scans = "coalesce((SELECT sum(pg_stat_get_xact_numscans(c.oid)) FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid"
	  . ' WHERE coalesce(i.indrelid, c.oid) = to_regclass(%s)), 0)';
	# in a session of its own, whose numbers of scans are of nothing else
	my $truth = $node->safe_psql('postgres', join(";\n", 'SET ROLE keeper', $path,
		q{CREATE TEMP TABLE was AS SELECT relname, relkind, pg_relation_filenode(oid) AS node FROM pg_class WHERE relnamespace = 'tw'::regnamespace AND relkind IN ('r', 'i')},
		'BEGIN',
		$alter,
		q{CREATE TEMP TABLE now AS SELECT c.relname, c.relkind, pg_relation_filenode(c.oid) <> w.node AS changed FROM pg_class c JOIN was w USING (relname) WHERE relnamespace = 'tw'::regnamespace},
		q{SELECT bool_or(changed) FILTER (WHERE relkind = 'r'), count(*) FILTER (WHERE relkind = 'i' AND changed),}
		  . q{ string_agg(format('tw.%I', relname), ', ' ORDER BY format('tw.%I', relname) COLLATE "C") FILTER (WHERE relkind = 'i' AND changed),}
		  . sprintf(" $scans > count(*) FILTER (WHERE changed), $scans > 0 FROM now", literal("tw.$s->{t}"), literal('tw.child')),
		'COMMIT'), on_error_stop => 1);
	return $advice eq $truth ? '' : "advice: $advice, but it is: $truth\n";
}

# The statements of "late".  Of the condition of a trigger on the column the swap
# knows only what PostgreSQL says of it, with casts written out (of varchar to
# text, of a domain to its base type), just as ALTER TABLE does of a CHECK.  So that
# is what the twin gets; it is asked while its column has the old type.
sub late_as_made_again
{
	my ($s) = @_;
	my @made = grep { /FUNCTION nothing/ } @{ $s->{late} };
	return @{ $s->{late} } if !@made;
	my $text = sql(join ";\n", 'SET ROLE keeper', 'SET search_path = tw, public', @made,
		q{SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname = 'of_column' AND tgrelid = } . literal("tw.$s->{t}") . '::regclass',
		'DROP FUNCTION nothing() CASCADE');
	return map { /^CREATE TRIGGER of_column/ ? $text : $_ } @{ $s->{late} };
}

# The table and all with it against the twin's
sub check_catalogs
{
	my ($s, $back) = @_;
	my @head = ('SET ROLE keeper', 'SET search_path = tw, public');
	sql(join ";\n", @head, $s->{late_index}) if $s->{has_late_index};
	my $same = $back || rewrites($s);
	my @late = $back ? @{ $s->{late} } : late_as_made_again($s);
	# A partition that came after a constraint that is NOT VALID has it proven, which ALTER
	# TABLE forgets, and a migration does not.
	my $proven = q{SELECT conrelid, conname FROM pg_constraint k JOIN pg_class c ON c.oid = conrelid
		WHERE relnamespace = 'tw'::regnamespace AND relispartition AND contype = 'c' AND convalidated};
	my @proven = split /\n/, sql("SELECT format('ALTER TABLE %s VALIDATE CONSTRAINT %I', conrelid::regclass, conname) FROM ($proven) k");
	my $advice = $back ? '' : check_advice($s);
	sql(join ";\n", @head, $same ? () : (@{ $s->{lost} }, @proven), @late);
	my ($is, $should) = map { $same && !$s->{parted} ? dump_of($_) : without_order(dump_of($_)) } 'gen', 'tw';
	# ALTER TABLE names the indexes of partitions anew, in an order of its own
	s/\b(part_[^.\n]*?_idx)\d+\b/$1/g for grep { $s->{parted} } $is, $should;
	($is, $should) = map { join "\n", sort split /\n/ } $is, $should if $s->{parted};
	return $advice . ($is eq $should ? '' : "catalogs:\n" . difference($is, $should) . "\n");
}

# What the rows should be, by plain SQL
sub check_rows
{
	my ($s, $back) = @_;
	my ($t, $c) = ($s->{t}, $s->{c});
	my $old = $s->{old} =~ s/ COLLATE.*//r;
	my $using = $s->{using_sql} // "CAST($c AS $s->{new})";
	my $expected = $back ? "l.truth::$old" : "CASE WHEN NOT l.bad THEN (SELECT $using FROM (SELECT l.truth::$old AS $c, l.rid, l.note) x)::$s->{new} END";
	my $fill = @{ $s->{fillers} // [] } ? 'OR l.fill <> md5(ROW(' . join(', ', map { "t.$_->[0]" } @{ $s->{fillers} }) . ')::text)' : '';
	my $null = $back ? back_from_null($s) : '';
	my $upd = $s->{counted} ? 'OR t.upd IS DISTINCT FROM l.upd' : '';
	my $wrong = sql(qq{
SET search_path = gen, public;
SELECT string_agg(format('%s: is %s, should be %s of %s; %s/%s; %s', coalesce(l.rid, t.rid), left(t.$c\::text, 60), left(($expected)::text, 60),
	left(l.truth, 60), t.note, l.note, CASE WHEN t.rid IS NULL THEN 'lost' WHEN l.rid IS NULL THEN 'too many' } . ($s->{counted} ? q{ELSE format('updated %s/%s', t.upd, l.upd)} : '') . qq{ END), E'\n')
FROM truth.ledger l FULL JOIN $t t ON t.rid = l.rid
WHERE l.rid IS NULL OR t.rid IS NULL OR t.$c\::text IS DISTINCT FROM ($expected)::text$null
	OR t.note IS DISTINCT FROM l.note $fill $upd});
	$wrong = substr($wrong, 0, 1500) . " ...\n" if length $wrong > 1500;
	my $doubled = sql("SELECT count(*) - count(DISTINCT rid) FROM gen.$t");
	my $orphans = $s->{fk_to} ? sql("SELECT count(*) FROM gen.child k WHERE ref IS NOT NULL AND NOT EXISTS (SELECT FROM gen.$t t WHERE t.$c = k.ref)") : 0;
	return join '', $wrong ? "rows:\n$wrong\n" : '', $doubled ? "$doubled rows doubled\n" : '', $orphans ? "$orphans orphans\n" : '';
}

# Nothing is left, and what is there is whole
sub check_rest
{
	my ($s) = @_;
	my $left = sql(qq{
SELECT string_agg(x, ', ') FROM (
	SELECT format('relation %s', oid::regclass) FROM pg_class WHERE relname ~ '^(rm_[a-z]+|shadow|log)_[0-9]'
	UNION ALL SELECT format('constraint %s', conname) FROM pg_constraint WHERE conname ~ '^rm_([no]|not_null)_[0-9]'
	UNION ALL SELECT format('trigger %s', tgname) FROM pg_trigger WHERE tgname ~ '~rm_'
	UNION ALL SELECT format('statistics %s', stxname) FROM pg_statistic_ext WHERE stxname ~ '^rm_[a-z]+_[0-9]'
	UNION ALL SELECT format('invalid index %s', indexrelid::regclass) FROM pg_index WHERE NOT indisvalid OR NOT indisready
	UNION ALL SELECT format('dependency %s %s', classid::regclass, pg_describe_object(classid, objid, objsubid)) FROM pg_depend
		WHERE refclassid = 'pg_proc'::regclass AND refobjid = 'risky_migrations.sync'::regproc AND classid = 'pg_class'::regclass
	UNION ALL SELECT format('skipped row %s', row_tid) FROM risky_migrations.skipped_row WHERE migration_id = $s->{id}
	UNION ALL SELECT format('dependent %s', name) FROM risky_migrations.dependent WHERE migration_id = $s->{id}
	UNION ALL SELECT format('step log %s %s', step, state) FROM risky_migrations.step_log WHERE migration_id = $s->{id} AND state = 'running'
	UNION ALL SELECT format('runner %s', running_pid) FROM rm_migrations WHERE id = $s->{id} AND running_pid IS NOT NULL) f (x)});
	my $err = '';
	$node->psql('postgres', q{
SELECT bt_index_check(c.oid, true) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam
WHERE c.relnamespace = 'gen'::regnamespace AND c.relkind = 'i' AND a.amname = 'btree' AND i.indisvalid}, stderr => \$err);
	return ($left ? "left: $left\n" : '') . ($err ? "index: $err\n" : '');
}

# After the swap: a value that only the new type takes closes the way back.
sub try_misfit
{
	my ($s) = @_;
	my $rid = 17;
	my $insert = "INSERT INTO gen.$s->{t} (rid, $s->{c}) VALUES (-$rid, " . literal($s->{misfit}) . ')';
	my $err = '';
	$node->psql('postgres', $insert, stderr => \$err);
	return $err =~ /foreign key|check constraint/ ? '' : "a value of the new type is refused: $err" if $err;
	my $refusal = finish(start_statement($s, "CALL rm_rollback($s->{id})"));
	my ($state) = look($s);
	return "a way back that leads nowhere: $refusal, $state" if $refusal !~ /way back|added to the new column|55006/ || $state ne 'open';
	push @{ $s->{story} }, 'misfit';
	sql("DELETE FROM gen.$s->{t} WHERE rid = -$rid");
	return '';
}

# What online_rewrite says that it cannot do, and is right.
my $needs_key = qr/It has no primary key, and no other unique index on columns that are NOT NULL|is part of its key, and the expression reads|it is one of a partitioned table/;

sub migrate
{
	my ($s) = @_;
	my $amiss = begin($s);
	if (rewrites($s) && $amiss =~ $needs_key)
	{
		$s->{method} = 'three_step';
		$s->{further} = [];
		$amiss = begin($s);
	}
	return $amiss if $amiss;
	foreach (1 .. int rand 4)
	{
		usleep(rand 200_000);
		disturb($s);
	}
	if ($s->{end} eq 'rollback anywhere')
	{
		usleep(rand 600_000);
		$node->psql('postgres', "SELECT rm_cancel($s->{id})");
		finish($s->{call});
		wait_until_idle($s);
		my ($state, $steps) = (look($s))[ 0, 3 ];
		# broken off behind the cut-over there is no way back either
		if ($state eq 'done' || rewrites($s) && $steps > 5)
		{
			$s->{end} = 'cleanup';
			push @{ $s->{story} }, 'too late';
			return go_on($s, 'done');
		}
		return go_on($s, 'rolled back', "CALL rm_rollback($s->{id})");
	}
	my $err = finish($s->{call});
	return "$s->{kind}: $err" if $err && $err !~ /57014|57P01|server closed the connection|terminating|no new value|55P03/;
	return go_on($s, 'done') if rewrites($s);
	$amiss = go_on($s, 'swapped');
	return $amiss if $amiss || $s->{story}[-1] eq 'given up';
	usleep(rand 200_000);
	disturb($s) if chance(0.2);
	wait_until_idle($s);
	if (defined $s->{misfit} && chance(0.5))
	{
		$amiss = try_misfit($s);
		return $amiss if $amiss;
	}
	return go_on($s, 'done', "CALL rm_cleanup($s->{id})") if $s->{end} eq 'cleanup';
	return go_on($s, 'rolled back', "CALL rm_rollback($s->{id})");
}

sub one_round
{
	my ($seed) = @_;
	srand($seed);
	my $s = make_up($seed % 4 == 0, $seed % 4 == 1);
	$s->{method} = pick('three_step', 'online_rewrite');
	$s->{end} = pick('cleanup', 'cleanup', rewrites($s) ? () : 'rollback', 'rollback anywhere');
	$s->{further} = [ rewrites($s) && $s->{on_error} eq 'stop' && chance(0.6) ? further_columns($s) : () ];
	$s->{writers} = pick(1, 2, 2);
	$s->{writer_settings} = [ map { chance(0.5) ? other_settings($s) : [] } 1 .. $s->{writers} ];
	# every other round by two workers, however few pages there are
	$s->{settings} = [
		'SET risky_migrations.max_row_lock_time = ' . pick(1, 25),
		'SET risky_migrations.workers = ' . (1 + ($seed + int($seed / 4)) % 2), 'SET risky_migrations.range_pages = 1'
	];
	my @t = (time);
	my $amiss = eval { set_up($s); '' } // "died: $@";
	push @t, time - $t[0];
	my @writers = start_writers($s);
	usleep(rand 100_000);
	$amiss ||= eval { migrate($s) } // "died: $@";
	push @t, time - $t[0];
	my $unfair = stop_writers(@writers);
	push @t, time - $t[0];
	my $back = $s->{end} ne 'cleanup';
	my $wrong = $amiss ? '' : eval { check_rows($s, $back) . check_catalogs($s, $back) . check_rest($s) } // "died: $@";
	push @t, time - $t[0];
	my $name = sprintf 'RM_SEED=%d: %s, %s, %d rows, %s (%s)', $seed, $s->{method}, $s->{kind}, $s->{rows}, $s->{end}, join(', ', @{ $s->{story} // [] });
	note sprintf 'set up %.1f, migrate %.1f, stop %.1f, check %.1f', @t[1..4] if $ENV{RM_TIMES};
	my $ok = is(join("\n", grep { $_ } $amiss, $unfair, $wrong), '', $name);
	diag join ";\n", @{ $s->{base} }, @{ $s->{late} } if !$ok;
	finish($s->{call}) if $s->{call} && $amiss;
	return $ok;
}

sql(q{
CREATE EXTENSION risky_migrations;
CREATE EXTENSION amcheck;
CREATE ROLE keeper LOGIN;
CREATE ROLE reader;
CREATE SCHEMA truth;
GRANT USAGE ON SCHEMA truth TO PUBLIC;
CREATE FUNCTION truth.long_text(k int) RETURNS text LANGUAGE sql IMMUTABLE
	AS $$ SELECT string_agg(md5((k + g)::text), '') FROM generate_series(1, 100 + k % 400) g $$;
});
foreach my $n (0 .. $rounds - 1)
{
	if (!one_round($base_seed + $n))
	{
		# a migration that is stuck is not the next round's business
		sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name <> '' AND backend_type <> 'autovacuum launcher'});
		sql(q{DELETE FROM risky_migrations.migration});
	}
	tear_down();
}

$node->stop;
done_testing();
