# Who may do what: the owner of a table needs no superuser for any of it, a
# NOLOGIN owner is reached by SET ROLE, and another role can neither start, go
# on with, take back nor see a migration of a table that is not its own.

use strict;
use warnings;

use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = LabNode->new('roles');
$node->init;
$node->append_conf('postgresql.conf', "client_min_messages = warning\n");
$node->start;

# All statements in one session of that role; dies if one fails.
sub as
{
	my ($role, $query) = @_;
	return $node->safe_psql('postgres', $query, extra_params => [ '-U', $role ]);
}

# The SQLSTATE with which the statements end, '' if none.
sub sqlstate_as
{
	my ($role, $query) = @_;
	my (undef, undef, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n$query",
		extra_params => [ '-U', $role ]);
	return $stderr =~ /ERROR:  ([0-9A-Z]{5}):/ ? $1 : '';
}

my $superuser = $node->safe_psql('postgres', 'SELECT current_user');

as($superuser, q{
CREATE EXTENSION risky_migrations;
CREATE ROLE app LOGIN;
CREATE ROLE stranger LOGIN;
CREATE ROLE keeper NOLOGIN;
CREATE ROLE member LOGIN NOINHERIT;
GRANT keeper TO member;
CREATE SCHEMA app AUTHORIZATION app;
CREATE SCHEMA keeper AUTHORIZATION keeper;
GRANT USAGE ON SCHEMA app, keeper TO stranger;
});

# the whole lab, with each of the two kinds of owner
foreach my $owner ([ 'app', 'SET search_path = app, public;' ],
	[ 'member', 'SET ROLE keeper; SET search_path = keeper, public;' ])
{
	my ($role, $set) = @$owner;
	my $name = $role eq 'app' ? 'an owner' : 'a NOLOGIN owner';

	as($role, "$set CALL rm_migrate('0001'); SELECT rm_seed(3000);");
	foreach my $target ('0003', '0004', '0005', '0004', '0003', '0001', '0002', '0005', '0001')
	{
		is( as($role, "$set CALL rm_migrate('$target'); SELECT * FROM rm_lab_check();"),
			'3000|0', "$name goes to $target");
	}
	as($role, "$set CALL rm_add_column('large_record', 'created_at', 'timestamp', 'created_at::timestamp');
		CALL rm_backfill_batched(1000); CALL rm_enforce_not_null();");
	is(as($role, "$set SELECT state, steps_done FROM rm_migrations WHERE state = 'open'"),
		'open|3', "$name does it step by step");
	as($role, "$set CALL rm_rollback()");
	# all steps in the background, as the owner: who may log in is the session's role
	my $started = as($role, "$set SELECT rm_start('large_record', 'created_at', 'timestamp', 'created_at::timestamp')");
	as($role, "$set SELECT rm_pause($started); SELECT rm_resume($started)");
	$node->poll_query_until('postgres', "SELECT steps_done, running_pid IS NULL FROM rm_migrations WHERE id = $started", '5|t')
	  or die 'the worker does not come to its end';
	is( as($superuser, qq{SELECT DISTINCT owner::regrole FROM risky_migrations.step_log WHERE migration_id = $started}),
		$role eq 'app' ? 'app' : 'keeper', "$name does it in the background");
	is(as($role, "$set SELECT * FROM rm_lab_check()"), '3000|0', "$name: every row is right");
	as($role, "$set CALL rm_rollback($started)");
	cmp_ok(as($role, "$set SELECT count(*) FROM rm_lock_report()"), '>', 0, "$name sees the locks");
	as($role, "$set CALL rm_migrate('0003')");
}
is(as('app', q{SELECT string_agg(DISTINCT relation, ' ' ORDER BY relation) FROM rm_migrations}),
	'app.large_record app.small_record', 'an owner sees only what is his');

# writers need nothing but what they had
as($superuser, q{
GRANT SELECT, INSERT, UPDATE ON app.large_record TO stranger;
GRANT USAGE ON SEQUENCE app.large_record_id_seq TO stranger;
});
as('stranger', q{
INSERT INTO app.large_record (name, created_at) VALUES ('written 2030-01-01 00:00:00', '2030-01-01 00:00:00');
UPDATE app.large_record SET name = 'written 2030-01-02 00:00:00', created_at = '2030-01-02 00:00:00' WHERE id = 5;
});
is( as('app', q{SELECT count(*) FROM app.large_record WHERE created_at_new IS NOT NULL}),
	2, 'a writer without any right on the state fires the sync trigger');

# nobody else
my $id = as('app', q{SELECT id FROM rm_migrations WHERE state = 'open'});
my @refused = (
	[ 'start one', q{CALL rm_add_column('app.large_record', 'name', 'text')} ],
	[ 'backfill', "CALL rm_backfill_batched(100, $id)" ],
	[ 'enforce', "CALL rm_enforce_not_null($id)" ],
	[ 'start one in the background', q{SELECT rm_start('app.large_record', 'name', 'text')} ],
	[ 'have all steps done', q{CALL rm_alter_type('app.large_record', 'name', 'text')} ],
	[ 'go on with it', "SELECT rm_resume($id)" ],
	[ 'run it', "CALL risky_migrations.run($id)" ],
	[ 'pause it', "SELECT rm_pause($id)" ],
	[ 'cancel it', "SELECT rm_cancel($id)" ],
	[ 'swap the columns', "CALL rm_swap($id)" ],
	[ 'cut over', "CALL rm_cut_over($id)" ],
	[ 'clean up', "CALL rm_cleanup($id)" ],
	[ 'take it back', "CALL rm_rollback($id)" ],
	[ 'look which values fail', q{SELECT * FROM rm_check_conversion('app.large_record', 'created_at', 'int', 'created_at::int')} ],
	[ 'ask for advice', q{SELECT * FROM rm_advise('app.large_record', 'created_at', 'int', 'created_at::int')} ],
	[ 'migrate the lab', q{SET search_path = app, public; CALL rm_migrate('0004')} ],
	[ 'seed the lab', q{SET search_path = app, public; SELECT rm_seed(10)} ],
	[ 'read the state', 'SELECT * FROM risky_migrations.migration' ],
	[ 'write the state', q{UPDATE risky_migrations.migration SET state = 'done'} ],
	[ 'read the log', 'SELECT * FROM risky_migrations.step_log' ]);
foreach my $case (@refused)
{
	is(sqlstate_as('stranger', $case->[1]), '42501', "another role cannot $case->[0]");
	is(sqlstate_as('app', $case->[1]), '42501', "nor can an owner $case->[0] himself")
	  if $case->[0] =~ /state|log/;
}
is(sqlstate_as('stranger', 'CALL rm_backfill_batched(100)'), '42704', 'for another role none is open');
is(sqlstate_as('member', "CALL rm_rollback($id)"), '42501', 'nor can an owner of another table touch it');
is(as('stranger', 'SELECT count(*) FROM rm_migrations'), 0, 'another role sees no migration');
is(as('stranger', 'SELECT count(*) FROM rm_lock_report()'), 0, 'nor its locks');
is(as('stranger', 'SELECT count(*) FROM rm_progress'), 0, 'nor its progress');
is(as('stranger', 'SELECT count(*) FROM rm_conversion_errors'), 0, 'nor its values');
is(as('app', q{SELECT state, steps_done FROM rm_migrations WHERE state = 'open'}),
	'open|1', 'and nothing has happened to it');

# ---------------------------------------------------------------------------
# Where the change is tried: online_rewrite asks for no privilege that is not there
# ---------------------------------------------------------------------------

as($superuser, q{
REVOKE TEMPORARY ON DATABASE postgres FROM PUBLIC;
CREATE SCHEMA closed;
GRANT USAGE ON SCHEMA closed TO app;
CREATE TABLE closed.t (id int PRIMARY KEY, v text);
INSERT INTO closed.t SELECT g, g FROM generate_series(1, 100) g;
ALTER TABLE closed.t OWNER TO app;
CREATE TABLE app.t (LIKE closed.t INCLUDING ALL);
INSERT INTO app.t TABLE closed.t;
ALTER TABLE app.t OWNER TO app;
});
my $rewrite = sub { return "CALL rm_alter_type('$_[0].t', 'v', 'int', 'v::int', method => 'online_rewrite')" };
as('app', $rewrite->('app'));
is(as('app', 'SELECT sum(v), min(pg_typeof(v)::text) FROM app.t'), '5050|integer', 'an owner without TEMPORARY: in the schema of the table');
foreach my $role ('app', $superuser)
{
	my (undef, undef, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n" . $rewrite->('closed'), extra_params => [ '-U', $role ]);
	like($stderr, qr/ERROR:  42501: the owner of table closed\.t may make tables neither in its schema nor temporary ones
DETAIL:  The change is tried on an empty copy of the table first, which is app's\.
HINT:  GRANT TEMPORARY ON DATABASE postgres TO app, or GRANT CREATE ON SCHEMA closed TO app\.\n/, "nor there: $role is told so");
}
is(as($superuser, q{SELECT (SELECT count(*) FROM rm_migrations WHERE relation = 'closed.t'), (SELECT count(*) FROM risky_migrations.rewrite)}), '0|0',
	'and nothing has begun');
as('app', 'ALTER TABLE closed.t ALTER v TYPE varchar(20)');
is(as('app', q{SELECT pg_typeof(v) FROM closed.t LIMIT 1}), 'character varying', 'which ALTER TABLE does not ask for');
as($superuser, 'GRANT TEMPORARY ON DATABASE postgres TO app');
as('app', $rewrite->('closed'));
is(as('app', 'SELECT sum(v), min(pg_typeof(v)::text) FROM closed.t'), '5050|integer', 'with TEMPORARY it may');

# What an index of the owner's runs, it runs as the owner, also constants in it, whoever migrates.
as('app', q{
CREATE FUNCTION app.who(i int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN IF current_user <> 'app' THEN RAISE EXCEPTION 'run as %', current_user; END IF; RETURN i; END $$;
CREATE TABLE app.watched (id int PRIMARY KEY, v text);
INSERT INTO app.watched SELECT g, g FROM generate_series(1, 100) g;
CREATE INDEX ON app.watched ((id + app.who(1)), app.who(id)) WHERE id > app.who(2) AND id < app.who(id) + 1;
});
as($superuser, "CALL rm_alter_type('app.watched', 'v', 'int', 'v::int', method => 'online_rewrite')");
is(as('app', q{SELECT count(*), sum(v), min(pg_typeof(v)::text) FROM app.watched}), '100|5050|integer', 'functions in indexes run as the owner');

$node->stop;
done_testing();
