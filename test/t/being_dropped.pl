# A child, or a view on the column, that somebody is dropping at the moment when a
# migration looks at it: it is waited for, and then it is no matter any more.  And the
# table itself, at each moment when nothing of the migration holds it.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = start_server('being_dropped', 'autovacuum = off');
my %drop = (
	child => 'DROP TABLE family2',
	# the first by its OID
	partition => 'DROP TABLE part1',
	'child that is taken away' => 'ALTER TABLE family2 NO INHERIT family; ALTER TABLE family2 DROP COLUMN v',
	view => 'DROP VIEW family_view',
	'view on a view' => 'DROP VIEW on_view',
	policy => 'DROP POLICY visible ON reader');

sub make_table
{
	my ($what) = @_;
	sql('CREATE TABLE part1 (id int NOT NULL, v text NOT NULL); CREATE TABLE part2 (id int NOT NULL, v text NOT NULL)') if $what eq 'partition';
	sql('CREATE TABLE family (id int PRIMARY KEY, v text NOT NULL)' . ($what eq 'partition' ? q{ PARTITION BY RANGE (id);
		ALTER TABLE family ATTACH PARTITION part1 FOR VALUES FROM (100) TO (200);
		ALTER TABLE family ATTACH PARTITION part2 FOR VALUES FROM (0) TO (100)} : ''));
	sql(q{INSERT INTO family VALUES (1, '1');
		CREATE INDEX ON family (v);
		CREATE TABLE reader (id int);
		ALTER TABLE reader ENABLE ROW LEVEL SECURITY});
	sql('CREATE TABLE family1 (PRIMARY KEY (id)) INHERITS (family); CREATE TABLE family2 (PRIMARY KEY (id)) INHERITS (family)')
	  if $what =~ /child/;
	return;
}

# What direct does not go with is made only for that which is dropped.
sub make_around
{
	my ($what) = @_;
	sql('CREATE VIEW family_view AS SELECT v FROM family') if $what =~ /view/;
	sql('CREATE VIEW on_view AS SELECT v FROM family_view') if $what =~ /on a view/;
	sql('CREATE POLICY visible ON reader USING (EXISTS (SELECT v FROM family))') if $what eq 'policy';
	return;
}

# The call, while somebody drops that.
sub beside
{
	my ($what, $statement, $name) = @_;
	my $dropper = $node->background_psql('postgres');

	$dropper->query_safe("BEGIN; $drop{$what}");
	my $call = start_call('migration', 'SET risky_migrations.lock_timeout = 20000', $statement);
	becomes(q{(SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'migration' AND wait_event_type = 'Lock')},
		"$name waits for it");
	$dropper->query_safe('COMMIT');
	$dropper->quit;
	ends_well($call, "$name goes on without it");
	return;
}

sub is_changed
{
	my ($name) = @_;
	is(sql('SELECT pg_typeof(v), v FROM family'), 'bigint|1', "$name: to its end");
	sql(q{SET client_min_messages = error; DROP TABLE IF EXISTS family, family2, reader CASCADE});
	return;
}

foreach my $what (sort keys %drop)
{
	foreach my $method (qw(online_rewrite three_step direct))
	{
		# ALTER TABLE would not go with them, and that is seen without a lock on them
		next if $method eq 'direct' && $what !~ /child|partition/;
		make_table($what);
		make_around($what);
		beside($what, "CALL rm_alter_type('family', 'v', 'bigint', 'v::bigint', method => '$method')", "$what, $method");
		sql('CALL rm_cleanup()') if $method eq 'three_step';
		is_changed("$what, $method");
	}
	foreach my $method (qw(online_rewrite three_step))
	{
		# its column is held by the trigger
		next if $method eq 'three_step' && $what =~ /taken away/;
		make_table($what);
		make_around($what);
		sql("CALL rm_alter_type('family', 'v', 'bigint', 'v::bigint', '$method', cut_over => 'manual')");
		beside($what, 'CALL rm_cut_over()', "$what, cut-over of $method");
		sql('CALL rm_cleanup()') if $method eq 'three_step';
		is_changed("$what, cut-over of $method");
	}
}

# ---------------------------------------------------------------------------
# The table itself
# ---------------------------------------------------------------------------

my $alter = q{rm_alter_type('family', 'v', 'bigint', 'v::bigint'};
my $last = 'SELECT last_step, last_step_state, sqlstate FROM rm_migrations ORDER BY id DESC LIMIT 1';

sub waits
{
	my ($application, $name) = @_;
	becomes("(SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = '$application' AND wait_event_type = 'Lock')", $name);
	return;
}

foreach my $statement (
	"CALL $alter)", "CALL $alter, 'three_step')", "CALL $alter, 'online_rewrite')", "CALL $alter, 'direct')",
	q{SELECT rm_start('family', 'v', 'bigint', 'v::bigint')}, q{SELECT * FROM rm_advise('family', 'v', 'bigint', 'v::bigint')},
	q{SELECT * FROM rm_check_conversion('family', 'v', 'bigint', 'v::bigint')})
{
	make_table('');
	my $dropper = $node->background_psql('postgres');
	$dropper->query_safe('BEGIN; DROP TABLE family');
	my $call = start_call('migration', $statement);
	waits('migration', "$statement waits for the table");
	$dropper->query_safe('COMMIT');
	$dropper->quit;
	finish_call($call);
	like($call->{err}, qr/ERROR:  42P01: the table does not exist any more/, 'and says that it is gone');
	sql('DROP TABLE reader');
}

# a snapshot of before the DROP finds the view each time
make_table('');
make_around('view');
{
	my $dropper = $node->background_psql('postgres');
	$dropper->query_safe('BEGIN; DROP VIEW family_view');
	my $call = start_call('migration', q{SET default_transaction_isolation = 'repeatable read'},
		q{SELECT * FROM rm_advise('family', 'v', 'bigint', 'v::bigint')});
	waits('migration', 'rm_advise in REPEATABLE READ waits for a view');
	$dropper->query_safe('COMMIT');
	$dropper->quit;
	finish_call($call);
	like($call->{err}, qr/ERROR:  40001: could not serialize access due to concurrent DROP/, 'and cannot know of it');
}
sql('DROP TABLE family, reader');

# between rm_start() and its worker
foreach my $method (qw(online_rewrite three_step))
{
	make_table('');
	my $starter = $node->background_psql('postgres');
	$starter->query_safe("BEGIN; SELECT rm_start('family', 'v', 'bigint', 'v::bigint', '$method')");
	my $dropper = start_call('dropper', 'DROP TABLE family');
	waits('dropper', "$method: DROP TABLE stands before the worker");
	$starter->query_safe('COMMIT');
	$starter->quit;
	ends_well($dropper, "$method: the table is dropped");
	becomes(q{(SELECT running_pid IS NULL AND last_step_state = 'failed' FROM rm_migrations ORDER BY id DESC LIMIT 1)}, "$method: the worker ends");
	is(sql($last) =~ s/^\w+\|//r, 'failed|42P01', 'and says why');
	sql('CALL rm_rollback()');
	sql('DROP TABLE reader');
}

# while an index is built nothing is locked between two of its transactions
make_table('');
{
	my $snapshot = $node->background_psql('postgres');
	$snapshot->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
	my $call = start_call('migration', "CALL $alter, 'three_step')");
	becomes(q{EXISTS (SELECT FROM rm_progress WHERE waiting_reason ~ 'CREATE INDEX CONCURRENTLY')}, 'an index is built, and waits for a snapshot');
	sql('SELECT rm_pause(max(id)) FROM rm_migrations');
	$snapshot->query_safe('COMMIT');
	$snapshot->quit;
	becomes(q{(SELECT paused FROM rm_progress)}, 'it is paused');
	wait_for("NOT EXISTS (SELECT FROM pg_locks WHERE relation = 'family'::regclass)", 'the table is locked');
	sql('DROP TABLE family; SELECT rm_resume(max(id)) FROM rm_migrations');
	finish_call($call);
	like($call->{err}, qr/ERROR:  42P01: the table of this migration does not exist any more/, 'resumed it says that the table is gone');
	is(sql($last), 'build|failed|42P01', 'so does the state');
	sql('CALL rm_rollback()');
}

$node->stop;
done_testing();
